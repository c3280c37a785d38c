"""Every shipped federation runs; two of them on the engine."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from slidetl.cli import main
from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import Averaged, Federation, Site, read_federation
from slidetl.federation.coordinator import SitesHere, run_rounds
from slidetl.federation.engine import SITE_FILE, _read_outcome, marked_process, read_site, write_site
from slidetl.federation.participant import Participant
from slidetl.federation.records import only_job, read_arrays
from slidetl.federation.site import Parts
from slidetl.files import file_sha256
from slidetl.training.checkpoint import load_grader
from slidetl.training.predictions import read_predictions
from tests.conftest import PATIENCE_S, Study
from tests.small import SMALL, small_weights

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "federated").glob("*.yaml"))


# Runs in every process of the engine: keeps all that a process sends, in a file by its name in NVFlare, and
# what it encrypts, before and after.
RECORDER = """
import importlib.abc, importlib.util, os, pickle, sys, threading


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), change(module))
        return spec


def keep(name, value):
    with open(os.path.join(os.environ["RECORDED"] + "-encrypted", f"{name}-{os.getpid()}"), "ab") as file:
        pickle.dump(value, file)


def record_encrypted(module):
    encrypt, serialised = module.Cipher.encrypt, module.serialised

    def keep_clear(self, before, after):
        keep("clear", dict(after))
        return encrypt(self, before, after)

    def serialise(ciphertexts, network):
        contents = serialised(ciphertexts, network)
        keep("hidden", contents)
        return contents

    module.Cipher.encrypt, module.serialised = keep_clear, serialise


def record(module):
    connection = module.SfmConnection
    send, lock = connection.send_frame, threading.Lock()

    def send_frame(self, prefix, headers, payload):
        path = os.path.join(os.environ["RECORDED"], self.local_endpoint.name.replace("/", "-"))
        with lock, open(path, "ab") as file:
            file.write(repr(headers).encode() + bytes(payload or b""))
        send(self, prefix, headers, payload)

    connection.send_frame = send_frame


CHANGES = {"nvflare.fuel.f3.sfm.sfm_conn": record, "slidetl.federation.encryption": record_encrypted}
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All messages between the processes of NVFlare, before encryption, by the sender."""
    hook, folder = tmp_path / "hook", tmp_path / "recorded"
    hook.mkdir()
    folder.mkdir()
    (tmp_path / "recorded-encrypted").mkdir()
    (hook / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RECORDED", str(folder))
    return folder


def check_messages(recorded: Path, sites: dict[str, Site]) -> None:
    """Asserts that weights have left each site, and nothing that names a slide, a patient or a place."""
    secrets = set()
    for site in sites.values():
        secrets |= {site.manifest, Path(site.manifest).name, site.cache}
        with Path(site.manifest).open() as file:
            for row in csv.DictReader(file):
                secrets |= {row["slide_id"], row["patient_id"], Path(row["path"]).name}
    for name in sites:
        sent = b"".join(path.read_bytes() for path in recorded.iterdir() if path.name.startswith(name))
        assert b"network.head.score.weight" in sent and len(sent) > 2e5
        assert not [secret for secret in secrets if secret.encode() in sent]


def check_encrypted(recorded: Path, networks: list[dict[str, np.ndarray[Any, Any]]]) -> None:
    """Asserts that ciphertexts have been sent and the means, and that no update was sent in the clear."""
    kept: dict[str, list[Any]] = {"clear": [], "hidden": []}
    for path in Path(f"{recorded}-encrypted").iterdir():
        with path.open("rb") as file, contextlib.suppress(EOFError):
            while True:
                kept[path.name.partition("-")[0]].append(pickle.load(file))
    sent = b"".join(path.read_bytes() for path in recorded.iterdir())
    of_sites = b"".join(
        path.read_bytes() for path in recorded.iterdir() if not path.name.startswith("server")
    )
    assert len(kept["clear"]) == len(kept["hidden"]) == 6  # three sites, two rounds
    assert all(ciphertext[5000:5100] in of_sites for update in kept["hidden"] for ciphertext in update)
    large = [name for name, value in networks[0].items() if value.size >= 16]
    for network in networks:  # so that the search finds arrays
        assert all(network[name].tobytes()[:64] in of_sites for name in large)
    starts = [[update[name].tobytes()[:64] for update in kept["clear"]] for name in large]
    trained = [of_entry for of_entry in starts if len(set(of_entry)) == 6]  # the others are as they were sent
    assert len(trained) > 10 and not [start for of_entry in trained for start in of_entry if start in sent]


def small(path: Path, sites: dict[str, Site], to: Path) -> Path:
    """Writes a shipped federation with the small sites and network, and one epoch in each of two rounds."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    for name, site in values["sites"].items():
        site |= {"examples": 4, "manifest": sites[name].manifest, "cache": sites[name].cache}
    values["data"] |= {"bag_size": 2, "num_workers": 0}
    values["model"]["backbone"] = {"name": SMALL, "pretrained": str(small_weights())}
    values |= {"rounds": 2, "local_epochs": 1, "trainer": {"accelerator": "cpu"}}
    config = to / path.name
    config.write_text(yaml.safe_dump(values))
    return config


def test_all_schemes_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {"averaged", "cyclic", "local", "peer_to_peer", "pooled"}
    assert all(read_federation(path).scheme == path.stem for path in SHIPPED)


@pytest.mark.slow  # six trainings each
@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem in ("local", "pooled")], ids=str)
def test_baselines_run_without_the_engine(
    path: Path, three_sites: dict[str, Site], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(path, three_sites, tmp_path)
    words = ["federate", "--config", str(config), "--output", str(tmp_path / "out")]
    assert main([*words, "--status", str(tmp_path / "status.json")]) == 0
    said = capsys.readouterr().out
    names = ["north", "south", "west"] if path.stem == "local" else ["pooled"]
    for name in names:
        assert f"{name}: round 2 of 2: rps 0." in said and f"{name}: best round " in said
        assert load_grader(tmp_path / "out" / "sites" / name / "checkpoints" / "best.ckpt").record
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    assert main(words) == 0  # nothing is left to do
    assert ": round " not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cyclic", "averaged", "peer_to_peer"])
def test_shipped_schemes_run_in_one_process(
    name: str, three_sites: dict[str, Site], parts_of: dict[str, Parts], tmp_path: Path
) -> None:
    path = next(path for path in SHIPPED if path.stem == name)
    federation = replace(read_federation(small(path, three_sites, tmp_path)), rounds=1)
    here = SitesHere(
        {site: Participant(federation, site, parts_of[site], tmp_path / site) for site in federation.sites}
    )
    assert run_rounds(federation, here, tmp_path, print)["kept"] == ["north", "south", "west"]


@pytest.mark.slow  # NVFlare takes most of a minute to start and end its processes
@pytest.mark.parametrize("name", ["averaged", "peer_to_peer", "encrypted"])
def test_the_engine_runs_a_federation(
    name: str,
    three_sites: dict[str, Site],
    study: Study,
    tmp_path: Path,
    recorded: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_encrypted, name = name == "encrypted", name.replace("encrypted", "averaged")
    config = small(next(path for path in SHIPPED if path.stem == name), three_sites, tmp_path)
    if is_encrypted:
        values = yaml.safe_load(config.read_text())
        values["averaged"]["encrypted"] = True
        config.write_text(yaml.safe_dump(values))
    output = tmp_path / "out"
    assert main(["federate", "--config", str(config), "--output", str(output), "--simulate"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("round 1 of 2: rps 0.") and "3 sites" in line]
    assert [line for line in said if line.startswith("round 2 of 2: rps 0.") and "left out" not in line]
    accounts = [json.loads((output / "rounds" / f"000{number}.json").read_text()) for number in (1, 2)]
    best = json.loads((output / "outcome.json").read_text())["best"]
    for account in accounts:
        if name == "averaged":
            network = output / "rounds" / f"000{account['round']}.safetensors"
            assert account["sha256"] == file_sha256(network)
    check_messages(recorded, three_sites)
    if is_encrypted:
        check_encrypted(
            recorded, [read_arrays(output / "rounds" / f"000{number}.safetensors") for number in (1, 2)]
        )
    # The result of a site is an ordinary checkpoint.
    here = output / "sites" / "north"
    lineage = load_grader(here / "checkpoints" / "best.ckpt").network.backbone.lineage
    if name == "averaged":
        assert lineage[0] == accounts[best - 1]["sha256"]
    options = [f"--ckpt_path={here / 'checkpoints' / 'best.ckpt'}", f"--config={here / 'config.yaml'}"]
    assert (
        main(["test", *options, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]) == 0
    )
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) == 1
    # No process of the engine is left, and no place of a slide is in what the engine was given.
    mark = (output / "engine" / "federation.json").read_text()
    assert str(study.cache) not in mark and "manifest" not in mark
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(output).encode() in command]


def test_a_missing_engine_or_place_is_one_line(
    three_sites: dict[str, Site],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(next(path for path in SHIPPED if path.stem == "averaged"), three_sites, tmp_path)
    words = ["federate", "--config", str(config), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "add --simulate for this machine, or --kit for several" in capsys.readouterr().err
    assert main([*words, "--kit", str(tmp_path / "none")]) == 2
    assert "the server does not let in" in capsys.readouterr().err
    values = yaml.safe_load(config.read_text())
    values["sites"]["south"] = {"examples": 4}
    (tmp_path / "no-place.yaml").write_text(yaml.safe_dump(values))
    assert main(["federate", "--config", str(tmp_path / "no-place.yaml"), *words[3:], "--simulate"]) == 2
    assert "sites: south needs manifest and cache" in capsys.readouterr().err
    monkeypatch.setattr("slidetl.federation.engine.find_spec", lambda name: None)
    assert main([*words, "--simulate"]) == 2
    assert "NVFlare is not installed" in capsys.readouterr().err
    values["averaged"]["encrypted"] = True
    config.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("slidetl.federation.engine.find_spec", lambda name: name == "nvflare" or None)
    assert main([*words, "--simulate"]) == 2
    told = "TenSEAL is not installed, which encrypts its updates: pip install 'slidetl[federated]'"
    assert told in capsys.readouterr().err


def test_a_second_simulation_in_an_output_is_refused(
    three_sites: dict[str, Site], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(next(path for path in SHIPPED if path.stem == "averaged"), three_sites, tmp_path)
    log = tmp_path / "out" / "engine" / "log.txt"
    log.parent.mkdir(parents=True)
    log.touch()
    with only_job(tmp_path / "out"):
        assert (
            main(["federate", "--config", str(config), "--output", str(tmp_path / "out"), "--simulate"]) != 0
        )
    assert "another training is at work" in capsys.readouterr().err
    assert log.exists()  # of the first one


def test_an_engine_without_a_result_has_failed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("INFO - begins\nERROR - Communication error\nINFO - ends\n")
    with pytest.raises(
        FederationError, match=r"without a result: ERROR - Communication error; see .*log.txt"
    ):
        _read_outcome(tmp_path, log)
    (tmp_path / "outcome.json").write_text('{"error": "no site answered"}')
    with pytest.raises(FederationError, match=r"^no site answered$"):
        _read_outcome(tmp_path, log)


def test_all_processes_of_an_engine_end_with_it(tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(600)")
    starter = (
        f"import subprocess, sys; subprocess.run([sys.executable, {str(sleeper)!r}], start_new_session=True)"
    )
    with marked_process([sys.executable, "-c", starter], {}, tmp_path / "log.txt"):
        deadline = time.monotonic() + PATIENCE_S
        while not (started := running(sleeper)) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert started and not running(sleeper)  # though in a session of its own, as the simulator's


def running(script: Path) -> list[bytes]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes())
    return [command for command in commands if command.endswith(f"\0{script}\0".encode())]


@pytest.mark.parametrize("cache", ["/data/cache", "s3://bucket/cache"])
def test_a_site_is_read_as_it_was_written(
    three: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    site = replace(three.sites["north"], manifest="/data/m.csv", cache=cache, split_from="external")
    write_site(tmp_path / "north.yaml", site, tmp_path / "folder")
    monkeypatch.setenv(SITE_FILE, str(tmp_path))
    assert read_site("north", three) == (site, tmp_path / "folder")


def test_the_file_of_a_site(three: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITE_FILE, raising=False)
    with pytest.raises(UsageError, match="manifest, cache and folder of north"):
        read_site("north", three)
    places = {"manifest": "m.csv", "cache": "c", "folder": "f"}
    (tmp_path / "north.yaml").write_text(yaml.safe_dump(places))
    for named in (tmp_path, tmp_path / "north.yaml"):
        monkeypatch.setenv(SITE_FILE, str(named))
        site, folder = read_site("north", three)
        assert (site.manifest, site.cache, str(folder)) == ("m.csv", "c", "f")
        assert site.examples == three.sites["north"].examples and site.split_from == "checkpoint"
    (tmp_path / "north.yaml").write_text(yaml.safe_dump({**places, "split_from": "external"}))
    assert read_site("north", three)[0].split_from == "external"
    (tmp_path / "north.yaml").write_text(yaml.safe_dump({**places, "split_from": "manifest"}))
    with pytest.raises(UsageError, match="must be checkpoint or external, not 'manifest'"):
        read_site("north", three)
    with pytest.raises(UsageError, match="east is no site"):
        read_site("east", three)
    for wrong in ({"grades": 3}, {"encrypted": False}, {"encrypted": "yes"}):
        (tmp_path / "north.yaml").write_text(yaml.safe_dump({**places, **wrong}))
        with pytest.raises(UsageError, match="expected manifest, cache, folder"):
            read_site("north", three)
    (tmp_path / "north.yaml").write_text(yaml.safe_dump({**places, "encrypted": True}))
    with pytest.raises(UsageError, match="sends encrypted updates alone"):
        read_site("north", three)
    assert read_site("north", replace(three, averaged=Averaged(encrypted=True)))[0].cache == "c"
