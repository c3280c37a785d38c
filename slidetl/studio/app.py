"""The pages: reads requests, asks the project, and fills templates. It never does a command's work itself."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote

from fastapi import Depends, FastAPI, Request
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from slidetl.compare.table import format_p
from slidetl.errors import CacheError, SlidetlError
from slidetl.evaluation.metrics import GradeMetrics
from slidetl.page import environment
from slidetl.studio import presets, results
from slidetl.studio.guard import REPORT_POLICY, Guard, Session
from slidetl.studio.jobs import WAITING, Job, JobQueue, Step, project_id
from slidetl.studio.paths import Refused, Root, check_name
from slidetl.studio.pictures import draw_thumbnail
from slidetl.studio.project import (
    SUFFIXES,
    Checked,
    Project,
    Settings,
    check_upload,
    list_folder,
    list_projects,
    read_form,
    row_key,
    row_state,
)
from slidetl.studio.texts import say
from slidetl.text import listed
from slidetl.tiles.ledger import EXCLUDED, USED
from slidetl.tiles.store import SlideCache, cache_path

_FORM_BYTES = 4 * 2**20
_MOST_FIELDS = 30_000
_ROOM_BYTES = 2**30  # left on a disk after an upload
_RISKS = (0.05, 0.1, 0.2, 0.3)
_BUCKET = re.compile(r"(s3|gs|abfs)://[A-Za-z0-9][\w.@/-]*")
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TYPES = {
    ".html": "text/html",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".csv": "text/csv",
    ".geojson": "application/geo+json",
}
# Of a project, what may be fetched: pictures of tiles, reports of comparisons, results of slides.
_SERVED = re.compile(
    r"cache/previews/[^/]+\.png|runs/[^/]+/report\.html|grades/[^/]+/[^/]+\.(html|png|csv|geojson)"
)

Form = dict[str, list[str]]
Cells = dict[str, dict[str, str]]  # of the labels, by row and column


@dataclass(frozen=True)
class Studio:
    """All that the pages share.

    Attributes:
        root: the folder that may be read.
        queue: of jobs.
        upload_bytes: largest upload.
    """

    root: Root
    queue: JobQueue
    upload_bytes: int

    @property
    def home(self) -> Path:
        """The folder of the projects."""
        return self.root.folder / "studio"


def open_studio(folder: Path, upload_gb: float) -> Studio:
    """Opens a folder; raises Refused if another studio has it."""
    root = Root(folder)
    queue = JobQueue(root.find("studio") / ".jobs")
    for part in root.find("studio").glob(f"*/slides/{_part_name('*', '*')}"):  # of a studio that was killed
        if root.holds(part):
            part.unlink(missing_ok=True)
    return Studio(root, queue, int(upload_gb * 1e9))


def _session(request: Request) -> Session:
    session: Session = request.state.session
    return session


async def _body(request: Request) -> bytes:
    """Reads the body of a request, of at most 4 MiB."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > _FORM_BYTES:
            raise Refused(say("form.size"), 413)
    return bytes(content)


async def _form(request: Request) -> Form:
    """Reads a form, and checks that it comes from a page of this session."""
    content = await _body(request)
    found: Form = {}
    try:
        for key, value in parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS):
            found.setdefault(key, []).append(value)
    except ValueError as error:
        raise Refused(say("form.size")) from error
    session: Session | None = request.state.session
    if session is not None:
        _check_csrf(session, _one(found, "csrf"))
    return found


def _check_csrf(session: Session, given: str) -> None:
    if not secrets.compare_digest(given.encode(), session.csrf.encode()):
        raise Refused(say("form.csrf"), 403)


def _one(form: Form, name: str) -> str:
    return form.get(name, [""])[0].strip()


def _number(text: str, default: float) -> float:
    try:
        return float(text.replace(",", ".")) if text else default
    except ValueError as error:
        raise Refused(say("train.bad")) from error


def _whole(text: str, default: int) -> int:
    try:
        return int(text) if text else default
    except ValueError as error:
        raise Refused(say("train.bad")) from error


def _project(name: str, request: Request) -> Project:
    studio: Studio = request.app.state.studio
    return Project(studio.root, studio.home, name)


FormOf = Annotated[Form, Depends(_form)]
ProjectOf = Annotated[Project, Depends(_project)]


def create_app(studio: Studio) -> FastAPI:
    """Builds the pages of a studio."""
    # Newer versions could be told by the environment to send telemetry away.
    quiet: Any = dict.fromkeys(("auto_configure", "tracing", "metrics", "logs"), False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, telemetry=quiet)
    app.state.studio = studio
    static = resources.files("slidetl.studio") / "static"
    app.mount("/static", StaticFiles(directory=str(static)), name="static")
    queue = studio.queue

    def show(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        session: Session | None = getattr(request.state, "session", None)
        shared = {
            "say": say,
            "csrf": session.csrf if session is not None else "",
            "take_notes": session.take_notes if session is not None else None,  # of whole pages alone
            "path": request.url.path,
            "project": values.get("project"),
        }
        text = environment("slidetl.studio").get_template(template).render(**{**shared, **values})
        return HTMLResponse(text.encode("utf-8", "backslashreplace"), status)  # as a terminal would have it

    def go(request: Request, project: Project, page: str, *notes: str, **query: str) -> RedirectResponse:
        _session(request).add_notes(project.name, notes)
        more = "&".join(f"{key}={quote(value)}" for key, value in query.items())
        return RedirectResponse(f"/p/{project.name}/{page}" + (f"?{more}" if more else ""), 303)

    def targets_of(project: Project) -> list[str]:
        return [job.target for job in queue.jobs(project.name, project.id)]

    def jobs_of(project: Project, *kinds: str) -> dict[str, Any]:
        """Returns what the list of jobs shows: the active ones, and the last of these kinds.

        Active jobs of projects that are gone are on every page: elsewhere nobody could stop them.
        """
        active = [job for job in reversed(queue.jobs()) if job.is_active]
        living = _living(studio.root, studio.home)
        every = queue.jobs(project.name, project.id)
        mine = [job for job in every if job.kind in kinds]
        chosen = [
            *reversed([job for job in mine if job.is_active]),
            *[j for j in mine if not j.is_active][:4],
        ]
        other = [
            job
            for job in active
            if job not in chosen and (job in every or (job.project, job.project_id) not in living)
        ]
        ahead = next((job for job in active if job.state != WAITING and job not in every), None)
        held = say("jobs.behind", title=_title(ahead), project=ahead.project) if ahead is not None else ""
        if queue.trouble:
            held = say("jobs.trouble", reason=queue.trouble)

        def shown(job: Job) -> dict[str, Any]:
            found = _shown(job, queue.status(job))
            if (job.project, job.project_id) not in living:
                found["title"] = say("jobs.gone", title=found["title"], project=job.project)
            return found | ({"progress": held} if job.state == WAITING else {})

        return {
            "jobs": [shown(job) for job in chosen],
            "others": [shown(job) for job in other],
            "watch": next((job.id for job in reversed(every) if job.is_active and job.kind in kinds), ""),
            "kinds": "-".join(kinds),
        }

    @app.exception_handler(SlidetlError)
    def on_mistake(request: Request, error: SlidetlError) -> Response:
        status = error.status if isinstance(error, Refused) else 400
        if request.method == "PUT":
            return PlainTextResponse(str(error).encode("utf-8", "backslashreplace"), status)
        return show(request, "error.html", status, message=str(error))

    @app.exception_handler(HTTPException)
    def on_missing(request: Request, error: HTTPException) -> Response:
        return show(request, "error.html", error.status_code, message=str(error.detail))

    @app.exception_handler(Exception)
    def on_bug(request: Request, error: Exception) -> Response:
        return PlainTextResponse(say("error.unknown"), 500)

    # --- who may ask ---

    @app.get("/login")
    def login(request: Request) -> Response:
        return show(request, "login.html", wrong=False)

    @app.post("/login")
    def enter(request: Request, form: FormOf) -> Response:
        guard: Guard = request.app.state.guard
        if guard.lets_in(_one(form, "password")):
            return guard.welcome()
        return show(request, "login.html", 403, wrong=True)

    # --- projects ---

    @app.get("/")
    def home(request: Request) -> Response:
        return show(request, "home.html", names=list_projects(studio.root, studio.home), usual=Settings())

    @app.post("/projects")
    def create(request: Request, form: FormOf) -> Response:
        grades = tuple(" ".join(name.split()) for name in _one(form, "grades").split(",") if name.strip())
        size = _whole(_one(form, "tile_size"), Settings.tile_size_px)
        settings = Settings("", grades, _number(_one(form, "mpp"), Settings.mpp), size)
        return go(request, Project.create(studio.root, studio.home, _one(form, "name"), settings), "slides")

    # --- slides ---

    @app.get("/p/{name}/slides")
    def slides(request: Request, project: ProjectOf, folder: str | None = None) -> Response:
        checked, ledger = project.check(), project.ledger()
        is_browsing = folder is not None or not checked.rows
        listed = list_folder(studio.root, folder or "") if is_browsing else None
        steps = presets.tile_steps(project)
        rows = [(row, ledger.get(row["slide_id"])) for row in checked.rows]
        states = [entry.status for _, entry in rows if entry is not None]
        return show(
            request,
            "slides.html",
            project=project,
            checked=checked,
            rows=rows,
            summary=say(
                "slides.summary",
                used=states.count(USED),
                n=len(rows),
                bad=len(states) - states.count(USED),
            ),
            statuses={"used": USED, "excluded": EXCLUDED},
            listed=listed,
            commands=_commands(steps),
            most_gb=f"{studio.upload_bytes / 1e9:g}",
            uploads=project.uploads.is_dir() and studio.root.show(project.uploads),
            **jobs_of(project, "tile"),
        )

    @app.post("/p/{name}/folder")
    def choose(request: Request, project: ProjectOf, form: FormOf) -> Response:
        notes = project.choose(_one(form, "folder"))
        return go(request, project, "slides", say("slides.taken", n=len(project.check().rows)), *notes)

    @app.post("/p/{name}/tile")
    def tile(request: Request, project: ProjectOf, form: FormOf) -> Response:
        if project.settings.slides:  # others may have come since
            _session(request).add_notes(project.name, project.choose(project.settings.slides))
        if not project.check().is_valid:
            raise Refused(say("slides.mistakes"))
        queue.add("tile", project.name, "", presets.tile_steps(project), project.folder)
        return go(request, project, "slides")

    @app.put("/p/{name}/upload/{file}")
    async def upload(request: Request, project: ProjectOf, file: str) -> Response:
        _check_csrf(_session(request), request.headers.get("x-csrf-token", ""))
        await _receive(request, project, check_upload(file), studio.upload_bytes)
        return PlainTextResponse(say("upload.done"), 201)

    @app.get("/p/{name}/thumbnail/{slide_id}.jpg")
    def thumbnail(project: ProjectOf, slide_id: str) -> Response:
        entry = project.ledger().get(slide_id)
        if entry is None or entry.status != USED:
            raise HTTPException(404)
        try:
            picture = draw_thumbnail(SlideCache.open(cache_path(project.cache, slide_id)))
        except CacheError as error:
            raise HTTPException(404) from error
        return Response(picture, media_type="image/jpeg")

    # --- labels ---

    def show_labels(request: Request, project: Project, cells: Cells, refusal: Refused | None) -> Response:
        checked = project.check()
        return show(
            request,
            "labels.html",
            refusal.status if refusal is not None else 200,
            refusal=refusal,
            form=read_form(checked.rows, cells),
            project=project,
            checked=checked,
            counts=_counts(checked, project.settings.grades),
            copies=project.copies(),
            row_key=row_key,
            row_state=row_state,
            own=bool(checked.rows) and all(row["patient_id"] == row["slide_id"] for row in checked.rows),
        )

    @app.get("/p/{name}/labels")
    def labels(request: Request, project: ProjectOf) -> Response:
        return show_labels(request, project, {}, None)

    @app.post("/p/{name}/labels")
    def save(request: Request, project: ProjectOf, form: FormOf) -> Response:
        cells: Cells = {}
        for name, values in form.items():
            column, colon, key = name.partition(":")
            if colon:
                cells.setdefault(key, {})[column] = values[0]
        try:
            checked = project.edit(cells)
        except Refused as refusal:  # what was typed stays on the page
            return show_labels(request, project, cells, refusal)
        return go(request, project, "labels", *([say("labels.saved")] if checked.is_valid else []))

    @app.put("/p/{name}/table")
    async def bring(request: Request, project: ProjectOf) -> Response:
        _check_csrf(_session(request), request.headers.get("x-csrf-token", ""))
        checked, notes = await run_in_threadpool(project.bring, await _body(request))
        _session(request).add_notes(
            project.name, [*notes, *([say("labels.saved")] if checked.is_valid else [])]
        )
        return PlainTextResponse("", 201)

    @app.get("/p/{name}/labels.csv")
    def download(project: ProjectOf, aside: bool = False) -> Response:
        if not project.labels.is_file():
            raise HTTPException(404)
        name = f"{project.name}-labels{'-aside' * aside}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(project.table(aside), media_type="text/csv", headers=headers)

    # --- train ---

    @app.get("/p/{name}/train")
    def train(request: Request, project: ProjectOf, epochs: str = "") -> Response:
        rounds = _whole(epochs, 30)
        ways = []
        for preset in presets.PRESETS:
            run = project.free_name(preset, targets_of(project))
            files = presets.train_files(project, preset, run, rounds)
            steps = presets.train_steps(project, preset, run, rounds)
            ways.append(
                (preset, _commands(steps), {f"runs/{run}/{name}": text for name, text in files.items()})
            )
        every = queue.jobs(project.name, project.id)
        fitted = next((job for job in every if job.kind == "train" and job.steps[0].words[0] == "fit"), None)
        return show(
            request,
            "train.html",
            project=project,
            ways=ways,
            epochs=rounds,
            is_ready=_is_ready(project, project.check()),
            curve=fitted.target if fitted is not None else "",
            is_live=fitted is not None and fitted.is_active,
            **jobs_of(project, "train"),
        )

    @app.post("/p/{name}/train")
    def start(request: Request, project: ProjectOf, form: FormOf) -> Response:
        checked = project.check()
        if not _is_ready(project, checked):
            raise Refused(say("train.not_ready"))
        preset, epochs = _one(form, "preset"), _whole(_one(form, "epochs"), 30)
        if preset not in presets.PRESETS:
            raise Refused(say("train.bad"))
        run = project.free_name(preset, targets_of(project))
        manifest = f"runs/{run}/manifest.csv"
        steps = presets.train_steps(project, preset, run, epochs, manifest)
        presets.write_files(project, run, presets.train_files(project, preset, run, epochs, manifest))
        project.write_manifest(manifest, checked)
        queue.add("train", project.name, run, steps, project.folder)
        return go(request, project, "train", say("train.started", run=run))

    @app.get("/p/{name}/runs/{run}/curve.json")
    def curve(project: ProjectOf, run: str) -> Response:
        return JSONResponse(results.curve(_run(project, run)))

    # --- model ---

    @app.get("/p/{name}/model")
    def model(request: Request, project: ProjectOf, run: str = "", risk: float = 0.1) -> Response:
        latest = (job.target for job in queue.jobs(project.name, project.id) if job.kind == "train")
        runs = [name for name in dict.fromkeys(latest) if (project.folder / "runs" / name).is_dir()]
        done = {
            job.target
            for job in queue.jobs(project.name, project.id)
            if job.kind == "train" and job.state == "done"
        }
        chosen = (
            run if run in runs else next((name for name in runs if name in done), runs[0] if runs else "")
        )
        folder = project.folder / "runs" / chosen
        judged = (
            results.judge(folder, len(project.settings.grades), min(max(risk, 0.001), 0.999))
            if chosen
            else None
        )
        return show(
            request,
            "model.html",
            project=project,
            runs=runs,
            run=chosen,
            judged=judged,
            relabelled=presets.relabelled(project, chosen) if chosen else [],
            shades=_shades(judged.metrics) if judged else [],
            verdict=results.verdict(folder) if chosen else None,
            format_p=format_p,
            listed=listed,
            has_report=(folder / "report.html").is_file(),
            limits=_limits(judged, project.settings.grades) if judged else [],
            risk=risk,
            risks=_RISKS,
            exported=(project.folder / "models" / f"{chosen}.pt").is_file(),
            models=[entry for entry in results.models(project.folder) if not entry.is_pulled],
            **jobs_of(project, "export", "publish", "pull"),
        )

    @app.post("/p/{name}/export")
    def export(request: Request, project: ProjectOf, form: FormOf) -> Response:
        run = _one(form, "run")
        folder = _run(project, run)
        judged = results.judge(folder, len(project.settings.grades), 0.1)
        patients = judged.patients if judged and not presets.relabelled(project, run) else 0
        licence = " ".join(_one(form, "licence").split())[:100]
        steps = presets.export_steps(run, folder, patients, licence)
        (project.folder / "models").mkdir(exist_ok=True)
        job = queue.add("export", project.name, run, steps, project.folder)
        return go(request, project, "model", say("model.queued", what=_title(job)), run=run)

    @app.post("/p/{name}/publish")
    def publish(request: Request, project: ProjectOf, form: FormOf) -> Response:
        file = f"models/{check_name(_one(form, 'model'), say('name.model'))}.pt"
        if not (project.folder / file).is_file():
            raise Refused(say("grade.no_such_model"), 404)
        words = [
            "zoo",
            "publish",
            file,
            "--to",
            _library(studio.root, _one(form, "to")),
            "--name",
            _model_name(form),
        ]
        for key in ("description", "intended_use"):
            if text := " ".join(_one(form, key).split())[:1000]:
                words.append(f"--{key.replace('_', '-')}={text}")
        job = queue.add("publish", project.name, _one(form, "name"), (Step(tuple(words)),), project.folder)
        return go(request, project, "model", say("model.queued", what=_title(job)))

    @app.post("/p/{name}/pull")
    def pull(request: Request, project: ProjectOf, form: FormOf) -> Response:
        words = ("zoo", "pull", _model_name(form), "--from", _library(studio.root, _one(form, "from")))
        job = queue.add("pull", project.name, _one(form, "name"), (Step(words),), project.folder)
        return go(request, project, "model", say("model.queued", what=_title(job)))

    # --- grade ---

    @app.get("/p/{name}/grade")
    def grade(request: Request, project: ProjectOf, folder: str = "", target: str = "") -> Response:
        models = {
            job.target: project.folder / job.steps[0].words[1]
            for job in queue.jobs(project.name, project.id)
            if job.kind == "grade"
        }
        targets = list(models)
        chosen = target if target in targets else next(iter(targets), "")
        rows = results.graded(project.folder / "grades" / chosen, models[chosen]) if chosen else []
        return show(
            request,
            "grade.html",
            project=project,
            models=results.models(project.folder),
            listed=list_folder(studio.root, folder),
            targets=targets,
            target=chosen,
            results=rows,
            **jobs_of(project, "grade"),
        )

    @app.post("/p/{name}/grade")
    def begin(request: Request, project: ProjectOf, form: FormOf) -> Response:
        models = {str(entry.path): entry for entry in results.models(project.folder)}
        entry = models.get(_one(form, "model"))
        if entry is None:
            raise Refused(say("grade.no_such_model"), 404)
        named = form.get("slide", [])
        if not named:
            raise Refused(say("grade.nothing"))
        files = [studio.root.find(text) for text in named]
        if not all(path.suffix.lower() in SUFFIXES and path.is_file() for path in files):
            raise Refused(say("grade.no_slide"))  # a table could name files elsewhere
        target = project.free_name("grades", targets_of(project))
        inside = entry.path.is_relative_to(project.folder)
        file = str(entry.path.relative_to(project.folder)) if inside else str(entry.path)
        (project.folder / "grades" / target).mkdir(parents=True)
        words = ("grade", file, *map(str, files), "--output", f"grades/{target}", "--report")
        queue.add("grade", project.name, target, (Step(words, fine=(0, 1)),), project.folder)
        return go(request, project, "grade", folder=_one(form, "folder"))

    # --- jobs and files ---

    @app.get("/p/{name}/jobs")
    def jobs(request: Request, project: ProjectOf, kinds: str = "", watch: str = "") -> Response:
        found = jobs_of(project, *kinds.split("-"))
        response = show(request, "_jobs.html", project=project, **found)
        if watch and watch != found["watch"]:
            response.headers["HX-Refresh"] = "true"  # its results are there now
        return response

    @app.get("/p/{name}/jobs/{job_id}/log")
    def log(project: ProjectOf, job_id: str) -> Response:
        return PlainTextResponse(queue.log(_job(queue, project, job_id)))

    def act(
        action: Callable[[str], None], request: Request, project: Project, job_id: str, form: Form
    ) -> Response:
        action(_job(queue, project, job_id).id)
        page = _one(form, "page")
        return go(request, project, page if page in ("slides", "train", "model", "grade") else "train")

    @app.post("/p/{name}/jobs/{job_id}/stop")
    def stop(request: Request, project: ProjectOf, job_id: str, form: FormOf) -> Response:
        return act(queue.stop, request, project, job_id, form)

    @app.post("/p/{name}/jobs/{job_id}/resume")
    def resume(request: Request, project: ProjectOf, job_id: str, form: FormOf) -> Response:
        return act(queue.resume, request, project, job_id, form)

    @app.get("/p/{name}/file/{path:path}")
    def file(project: ProjectOf, path: str) -> Response:
        found = studio.root.find(project.folder / path)
        if not _SERVED.fullmatch(path) or not found.is_relative_to(project.folder) or not found.is_file():
            raise HTTPException(404)
        kind = _TYPES[found.suffix]
        if kind == "text/html":
            return FileResponse(found, media_type=kind, headers={"Content-Security-Policy": REPORT_POLICY})
        name = None if kind.startswith("image/") else found.name
        return FileResponse(found, media_type=kind, filename=name)

    return app


async def _receive(request: Request, project: Project, name: str, most: int) -> None:
    """Streams an upload to its place; refuses it before it is read where its length is told."""
    too_large = Refused(say("upload.too_large", most=f"{most / 1e9:g}"), 413)
    told = request.headers.get("content-length", "")
    length = int(told) if told.isdecimal() else None
    if length is not None and length > most:
        raise too_large
    project.uploads.mkdir(exist_ok=True)
    path = project.root.find(project.uploads / name)
    if path.exists():
        raise Refused(say("upload.exists"), 409)
    room = shutil.disk_usage(project.uploads).free - _ROOM_BYTES
    if length is not None and length > room:
        raise Refused(say("upload.no_room"), 507)
    part = path.with_name(_part_name(name, secrets.token_hex(8)))  # of this upload: another may have the name
    written = 0
    try:
        with part.open("xb") as file:
            async for chunk in request.stream():
                written += len(chunk)
                if written > most:
                    raise too_large
                if written > room:
                    raise Refused(say("upload.no_room"), 507)
                await run_in_threadpool(file.write, chunk)
        if part.stat().st_size != written or length not in (None, written):
            raise Refused(say("upload.short"))
        _take_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_name(name: str, token: str) -> str:
    return f".{name}.{token}.partial"


def _take_name(part: Path, path: Path) -> None:
    """Puts a whole upload into its place; raises Refused if another came first."""
    try:
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a share without hard links
            path.touch(exist_ok=False)
            part.rename(path)
    except FileExistsError as error:
        raise Refused(say("upload.exists"), 409) from error


def _commands(steps: tuple[Step, ...]) -> str:
    return "\n".join(f"slidetl {shlex.join(step.words)}" for step in steps)


def _title(job: Job) -> str:
    return say(f"jobs.kind_{job.kind}", target=job.target)


def _shown(job: Job, status: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page shows of a job."""
    done, total = status.get("done"), status.get("total")
    is_running = job.state in ("running", "stopping")
    progress = ""
    if is_running and status:
        kind = "jobs.progress" if total else "jobs.progress_open"
        progress = say(kind, stage=status.get("stage"), done=done, total=total, unit=status.get("unit"))
    partly = job.state == "done" and job.exit_code == 1
    metrics = status.get("metrics") or {}
    return {
        "job": job,
        "title": _title(job),
        "state": say("jobs.partly" if partly else f"jobs.state_{job.state}"),
        "progress": progress,
        "done": done if is_running and total else None,
        "total": total if is_running and total else None,
        "metrics": [(name, metrics[name]) for name in results.CURVES if is_running and name in metrics],
        "step": say("jobs.step", step=job.step + 1, steps=len(job.steps))
        if len(job.steps) > 1 and is_running
        else "",
        "commands": _commands(job.steps),
    }


def _counts(checked: Checked, grades: tuple[str, ...]) -> dict[str, Any]:
    """Counts slides by grade and site, and patients."""
    sites = sorted({row["site"] for row in checked.rows})
    table = [
        (
            site,
            [sum(row["grade"] == name and row["site"] == site for row in checked.rows) for name in grades],
        )
        for site in sites
    ]
    return {
        "by_grade": [sum(row["grade"] == name for row in checked.rows) for name in grades],
        "ungraded": len(checked.rows) - checked.graded,
        "patients": len({row["patient_id"] for row in checked.rows}),
        "by_site": table,
    }


def _is_ready(project: Project, checked: Checked) -> bool:
    return (
        checked.is_valid
        and checked.graded > 0
        and any(row.status == USED for row in project.ledger().values())
    )


def _run(project: Project, run: str) -> Path:
    folder = project.root.find(project.folder / "runs" / check_name(run, "run"))
    if not folder.is_dir():
        raise HTTPException(404)
    return folder


def _living(root: Root, home: Path) -> set[tuple[str, str]]:
    """Lists the projects by name and id."""
    return {(name, project_id(home / name)) for name in list_projects(root, home)}


def _job(queue: JobQueue, project: Project, job_id: str) -> Job:
    """Finds a job of this project, or of one that is gone."""
    job = queue.find(job_id)
    owner = (job.project, job.project_id)
    if owner != (project.name, project.id) and owner in _living(project.root, project.folder.parent):
        raise HTTPException(404)
    return job


def _library(root: Root, text: str) -> str:
    """Returns the place of a library: a folder below the root, or a bucket."""
    if _BUCKET.fullmatch(text) and ".." not in text:
        return text
    if not text or "://" in text or "::" in text:
        raise Refused(say("model.bad_library"))
    return str(root.find(text))


def _model_name(form: Form) -> str:
    name = _one(form, "name")
    if not _MODEL_NAME.fullmatch(name):
        raise Refused(say("model.bad_name"))
    return name


def _shades(metrics: GradeMetrics) -> list[list[tuple[int, int]]]:
    """Returns the confusion matrix as counts, each with a shade from 0 to 5."""
    most = max(1, *(max(row) for row in metrics.confusion))
    return [[(count, round(5 * count / most)) for count in row] for row in metrics.confusion]


def _limits(judged: results.Judged, grades: tuple[str, ...]) -> list[str]:
    """Says in plain words what the numbers do not show."""
    kind = "model.limit_few" if judged.patients < 30 else "model.limit_some"
    said = [say(kind, n=judged.patients)]
    absent = [name for name, row in zip(grades, judged.metrics.confusion, strict=True) if not sum(row)]
    if absent:
        said.append(say("model.limit_absent", grades=", ".join(absent)))
    if len(judged.sites) < 2:
        said.append(say("model.limit_one_site"))
    return [*said, say("model.limit_population"), say("model.limit_research")]
