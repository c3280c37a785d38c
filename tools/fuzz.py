"""Reads mutated files: an error of slidetl or a result, and nothing else on the machine.

Each kind runs in a process of its own that may take 1 GB more than it has after its imports. Its audit hook
sees what is executed, connected to, written or deleted; any of it, another kind of error, or more than 5 s
for a file, is a finding. Prints a table.

    python -m tools.fuzz --seed 0 > docs/evidence/fuzz.md
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SECONDS, BYTES = 5, 10**9
Case = tuple[str, Callable[[], object]]  # what was done to the file, and the reading of it
Rng = np.random.Generator

# Modules of slidetl are full of others' names; the rest are what an attacker would ask for.
_TARGETS = (
    *(
        "os.system",
        "os._exit",
        "os.abort",
        "os.truncate",
        "subprocess.Popen",
        "builtins.exec",
        "builtins.eval",
    ),
    *("shutil.rmtree", "torch.load", "torch.hub.load", "pickle.loads", "runpy.run_path", "fuzzcanary.Head"),
    *("slidetl.cli.main", "slidetl.__main__.main", "slidetl.page.write_page"),
    *(
        "pytorch_lightning.callbacks.LambdaCallback",
        "pytorch_lightning.Trainer",
        "jsonargparse.set_parsing_settings",
    ),
)
_FORBIDDEN: tuple[str, ...] = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "os.kill",
    "os.remove",
)
_FORBIDDEN += (
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "socket.connect",
    "socket.getaddrinfo",
    "pty.spawn",
)


def names_inside() -> list[str]:
    """Every name that can be reached through a module of slidetl, with those to attack by."""
    found = set(_TARGETS)
    for module in [name for name in sys.modules if name.startswith("slidetl.")]:
        for name, value in vars(sys.modules[module]).items():
            found.add(f"{module}.{name}")
            if type(value) is type(sys) and not value.__name__.startswith("slidetl"):
                found |= {f"{module}.{name}.{inner}" for inner in list(vars(value))[:40]}
    return sorted(found)


def value(rng: Rng, names: list[str], depth: int = 0) -> Any:
    """A value where none or another was expected."""
    kind = int(rng.integers(11 if depth < 2 else 9))
    if kind == 9:
        return {"class_path": str(rng.choice(names)), "init_args": value(rng, names, depth + 1)}
    if kind == 10:
        return {str(rng.choice(["x", "class_path", "in_features", "dim"])): value(rng, names, depth + 1)}
    return [
        *(None, True, -1, 10**12, float("nan"), "../../etc/passwd", str(rng.choice(names)), [], {}),
    ][kind]


def mutated(rng: Rng, tree: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """One to three changes at random places of nested values."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 4))):
        place = tree
        while True:
            key = str(rng.choice([*place, "new"]))
            if isinstance(place.get(key), dict) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            break
        if rng.random() < 0.3:
            place.pop(key, None)
        elif key == "class_path":
            place[key] = str(rng.choice(names))
        else:
            place[key] = value(rng, names)
    return tree


def scrambled(rng: Rng, content: bytes) -> bytes:
    """Some bytes changed, cut out or repeated."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(max(1, len(data))))
        how = int(rng.integers(4))
        if how == 0:
            data[at : at + 1] = bytes([int(rng.integers(256))])
        elif how == 1:
            del data[at : at + int(rng.integers(1, 20))]
        elif how == 2:
            data[at:at] = data[at : at + 8] * int(rng.integers(1, 50))
        else:
            data[at : at + 1] = str(10 ** int(rng.integers(1, 19))).encode()
    return bytes(data)


MODEL: dict[str, Any] = {
    "backbone": {"name": "cbr_tiny", "pretrained": "imagenet", "in_channels": 3},
    "aggregator": {
        "class_path": "slidetl.models.aggregators.GatedAttention",
        "init_args": {"hidden_features": 8},
    },
    "head": {"class_path": "slidetl.models.heads.CumulativeLink"},
    "transfer": {"class_path": "slidetl.models.transfer.SharedWeights", "init_args": {"alpha": 0.1}},
    "schedule": {"class_path": "slidetl.training.schedules.OneCycle"},
    "grades": ["0", "1", "2"],
    "lr": 1e-3,
    "targets": {"smoothing": 0.1},
    "tasks": [],
}


def checkpoints(rng: Rng, folder: Path) -> Iterator[Case]:
    """Hyper-parameters of a checkpoint, through ``export``'s reader."""
    import timm  # noqa: F401 (takes seconds)
    import torch

    from slidetl.training.checkpoint import _build, load_grader

    names, path = names_inside(), folder / "c.ckpt"
    state = _build({"hyper_parameters": MODEL}, ()).state_dict()
    torch.save({"hyper_parameters": MODEL, "state_dict": state}, path)
    load_grader(path)  # else all would be refused for what was never changed
    while True:
        values = mutated(rng, MODEL, names)
        torch.save({"hyper_parameters": values, "state_dict": state}, path)
        yield json.dumps(values), lambda: load_grader(path)


def configurations(rng: Rng, folder: Path) -> Iterator[Case]:
    """The YAML of ``fit``, by its values and by its bytes."""
    import pytorch_lightning as pl
    import yaml
    from jsonargparse import ArgumentError
    from pytorch_lightning.cli import LightningArgumentParser

    from slidetl.data.datamodule import SlideDataModule
    from slidetl.errors import UsageError
    from slidetl.training.grader import SlideGrader
    from slidetl.training.slots import parse

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SlideGrader, "model")
    parser.add_class_arguments(SlideDataModule, "data")
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    names = names_inside()
    callback = {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {"every_n_epochs": 2},
    }
    whole = {
        "model": MODEL,
        "data": {"manifest": "m", "cache": "c", "sampling": {"class_path": "slidetl.data.sampling.Uniform"}},
        "trainer": {"max_epochs": 1, "callbacks": [callback], "logger": True, "strategy": "auto"},
    }

    def read(text: bytes) -> None:
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(str(error)) from error
        if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
            raise UsageError("not a configuration")
        try:
            ready = parser.instantiate_classes(parse(parser, values))
        except (ArgumentError, TypeError, ValueError) as error:  # as LightningCLI and main take them
            raise UsageError(str(error)) from error
        del ready

    read(yaml.safe_dump(whole).encode())
    while True:
        text = yaml.safe_dump(mutated(rng, whole, names)).encode()
        text = scrambled(rng, text) if rng.random() < 0.3 else text
        yield text.decode("utf-8", "replace"), lambda text=text: read(text)  # type: ignore[misc]


def ome_xml(rng: Rng, folder: Path) -> Iterator[Case]:
    """The description of an OME-TIFF."""
    import tifffile

    from slidetl.slides import open_slide

    path = folder / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), ome=True, tile=(32, 32), photometric="rgb")
    with tifffile.TiffFile(path) as file:
        xml = (file.ome_metadata or "").encode()

    def read() -> None:
        with open_slide(path, 0.5) as slide:
            slide.read((0, 0), (32, 32), 0.5)

    while True:
        text = scrambled(rng, xml).replace(b"\0", b" ")
        for name in (b"SizeT", b"SizeX", b"SizeZ", b"PhysicalSizeX"):
            if rng.random() < 0.2:
                at = text.find(name + b'="')
                if at >= 0:
                    end = text.find(b'"', at + len(name) + 2)
                    number = str(rng.choice(["-1", "0", "nan", "1e9", "1000000000", "1e-300", "x"])).encode()
                    text = text[: at + len(name) + 2] + number + text[end:]
        description = text.decode("ascii", "replace").encode("ascii", "replace")
        with tifffile.TiffWriter(path) as writer:
            page = np.zeros((64, 64, 3), np.uint8)
            writer.write(page, tile=(32, 32), photometric="rgb", description=description, metadata=None)
        yield repr(description), read


def npz(rng: Rng, folder: Path) -> Iterator[Case]:
    """Headers of arrays in an archive, and the archive's own."""
    from slidetl.slides.npz import NpzItem, read_labels

    path = folder / "a.npz"

    def header(shape: object, kind: str) -> bytes:
        text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(100) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    def read() -> None:
        for split in read_labels(path):
            NpzItem(path, split, 0).read()

    sizes = [0, 1, 3, -1, 60_000_000, 10**9, 2**62]
    while True:
        parts, changed = {}, str(rng.choice(["train", "val", "test", "none"]))
        for split in ("train", "val", "test"):
            n, kind, body = 3, "|u1", bytes(576)
            shape: tuple[int, ...] = (3, 8, 8, 3)
            if split == changed:
                n = int(rng.choice(sizes))
                shape = (n, 8, 8, 3)
                if rng.random() < 0.3:
                    shape = tuple(int(size) for size in rng.choice(sizes, rng.integers(6)))
                kind = str(rng.choice(["|u1", "|u1", "<f8", "|O", "<U999999999", "<i8", "x"]))
                body = bytes(int(rng.choice([576, 10**6, 10**7])))
            parts[f"{split}_images.npy"] = header(shape, kind) + body
            parts[f"{split}_labels.npy"] = header((n,), "|u1") + body[: 3 if n == 3 else None]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in parts.items():
                whole = scrambled(rng, content[:130]) + content[130:] if rng.random() < 0.1 else content
                archive.writestr(name, whole)
        if rng.random() < 0.3:
            content = path.read_bytes()
            path.write_bytes(content[:-300] + scrambled(rng, content[-300:]))
        yield str({name: content[:110] for name, content in parts.items()}), read


def safetensors(rng: Rng, folder: Path) -> Iterator[Case]:
    """The header of weights, through ``embed``'s reader."""
    from safetensors.torch import save

    from slidetl.models.backbones import Backbone, read_pretrained
    from slidetl.models.spec import BackboneSpec

    path = folder / "a.safetensors"
    spec = BackboneSpec("cbr_tiny", str(path))
    weights = {name: value.contiguous() for name, value in Backbone(spec).net.state_dict().items()}
    content = save(weights, {"mean": "[0.5, 0.5, 0.5]", "std": "[1, 1, 1]"})
    length = struct.unpack("<Q", content[:8])[0]
    while True:
        head, told = scrambled(rng, content[8 : 8 + length]), None
        if rng.random() < 0.3:
            about = json.loads(content[8 : 8 + length])
            about["__metadata__"] = {
                "mean": str(rng.choice(["nan", "[" * 5000, "{}", "[1]", '["a", 1, 2]', "[1e999, 1, 1]"])),
                "std": str(rng.choice(["[0, 0, 0]", "[1, 1, 1]", "null"])),
            }
            head = json.dumps(about).encode()
        if rng.random() < 0.2:
            told = int(rng.choice([0, 1, 10**6, 99_000_000, 2**62]))
        path.write_bytes(
            struct.pack("<Q", len(head) if told is None else told) + head + content[8 + length :]
        )
        yield repr(head[:300]), lambda: read_pretrained(spec)


def volumes(rng: Rng, folder: Path) -> Iterator[Case]:
    """A slice of a DICOM series, and NIfTI and MetaImage, mostly their headers."""
    import SimpleITK as sitk

    from slidetl.volumes import read_volume
    from tools.bench_volumes import draw_series

    draw_series(folder / "series", (8, 8, 3))
    image: Any = sitk.GetImageFromArray(read_volume(folder / "series").hu)
    for name in ("a.nii", "a.nii.gz", "a.mha", "packed.mha"):
        sitk.WriteImage(image, str(folder / name), useCompression=name in ("a.nii.gz", "packed.mha"))
    one = sorted((folder / "series").iterdir())[1]
    files = [one, *(folder / name for name in ("a.nii", "a.nii.gz", "a.mha", "packed.mha"))]
    contents = {path: path.read_bytes() for path in files}
    while True:
        path = files[int(rng.integers(len(files)))]
        content, packed = contents[path], path.suffix == ".gz"
        content = gzip.decompress(content) if packed else content
        head = int(rng.choice([len(content), 400]))
        content = scrambled(rng, content[:head]) + content[head:]
        path.write_bytes(gzip.compress(content) if packed and rng.random() < 0.7 else content)
        yield (
            f"{path.name} {content[:200]!r}",
            partial(read_volume, folder / "series" if path == one else path),
        )
        path.write_bytes(contents[path])


KINDS = {kind.__name__: kind for kind in (checkpoints, configurations, ome_xml, npz, safetensors, volumes)}
FILES = {"checkpoints": 2000, "volumes": 2000}


def run(kind: str, files: int, seed: int) -> dict[str, Any]:
    """Reads so many files of a kind in this process."""
    from slidetl.errors import SlidetlError

    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    events: list[str] = []
    slowest, is_reading = 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fuzzcanary.py").write_text("import os\nos.system('true')\n")
        sys.path.insert(0, folder)
        cases = KINDS[kind](np.random.default_rng(seed), Path(folder))
        case = next(cases)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            is_write = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if is_reading and (event in _FORBIDDEN or is_write):
                events.append(f"{event} {arguments!r:.100}")

        def ended(*_: object) -> None:
            raise TimeoutError(f"more than {SECONDS} s")

        sys.addaudithook(watch)
        signal.signal(signal.SIGALRM, ended)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(files):
            text, read = case if number == 0 else next(cases)
            events.clear()
            started, is_reading = time.monotonic(), True
            signal.alarm(SECONDS)
            try:
                read()
                outcomes["read"] += 1
            except SlidetlError:
                outcomes["refused in one line"] += 1
            except BaseException as error:
                outcomes["finding"] += 1
                findings.append(f"{type(error).__name__}: {error!s:.200} of {text:.400}")
            finally:
                signal.alarm(0)
                is_reading = False
            slowest = max(slowest, time.monotonic() - started)
            if events:
                outcomes["finding"] += 1
                findings.append(f"{events} of {text:.400}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    imported = "fuzzcanary" in sys.modules
    return {
        "kind": kind,
        "files": files,
        "outcomes": outcomes,
        "slowest": slowest,
        "growth": growth,
        "findings": findings + ["the canary was imported"] * imported,
    }


def main() -> int:
    """Runs every kind in a process of its own and prints the table; exit code 1 if there is a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--files",
        type=int,
        help="of each kind, instead of 2000 checkpoints and volumes and 500 of the others",
    )
    parser.add_argument("--kind", choices=KINDS, help="that one alone, in this process")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(run(options.kind, options.files or FILES.get(options.kind, 500), options.seed)))
        return 0
    import torch

    import slidetl

    print("# Mutated files\n")
    print(f"`tools/fuzz.py --seed {options.seed}`, slidetl {slidetl.__version__}, torch {torch.__version__}.")
    print("A file may not run, connect to, write or delete anything, import what its slots do not list, or")
    print("take 5 s or 1 GB more than the process has after its imports.\n")
    print("| files | number | read | refused in one line | findings | slowest, s | growth of memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    found = 0
    for kind in KINDS:
        words = [sys.executable, "-m", "tools.fuzz", "--kind", kind, "--seed", str(options.seed)]
        words += ["--files", str(options.files)] if options.files else []
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            print(f"| {kind} | ended with {done.returncode}: {done.stderr[-300:]!r} |", flush=True)
            found += 1
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        counts = [result["outcomes"].get(name, 0) for name in ("read", "refused in one line")]
        cells = [kind.replace("_", " "), result["files"], *counts, len(result["findings"])]
        print(
            "|",
            " | ".join(map(str, [*cells, f"{result['slowest']:.2f}", f"{result['growth']:.0f}"])),
            "|",
            flush=True,
        )
        found += len(result["findings"])
        for line in result["findings"]:
            print(f"{kind}: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
