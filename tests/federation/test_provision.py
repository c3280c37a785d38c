from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.sec.security_content_service import SecurityContentManager, SecurityContentService

from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import Averaged, Federation
from slidetl.federation.encryption import Cipher, serialised
from slidetl.federation.engine import KEYS_OF_SERVER, KEYS_OF_SITES
from slidetl.federation.nvflare_app import _read_cipher
from slidetl.federation.nvflare_job import ALLOWED, make_recipe
from slidetl.federation.provision import ADMIN, provision


def holds_secret(path: Path) -> bool:
    """Tells if a file has a private key of a certificate, or keys of encryption."""
    return path.is_file() and (path.suffix == ".tenseal" or b"PRIVATE KEY" in path.read_bytes())


def test_kits_let_in_no_code_and_out_no_log(tmp_path: Path) -> None:
    kits = provision(tmp_path / "kits", "localhost:18102", ["north", "south"])
    assert kits.keys() == {"localhost", "north", "south", ADMIN}
    for name in ("localhost", "north", "south"):
        resources = json.loads((kits[name] / "local" / "resources.json").read_text())
        assert resources["class_allow_list"] == ALLOWED
        assert "site_log_streamer" not in {part["id"] for part in resources["components"]}
        assert not resources.get("allow_log_streaming")
        rights = json.loads((kits[name] / "local" / "authorization.json").read_text())["permissions"]
        assert {right["byoc"] for right in rights.values()} == {"none"}
        assert {right["shell_commands"] for right in rights.values()} == {"none"}
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "kits").rglob("*")}
    secret = {path.name: mode for path, mode in modes.items() if holds_secret(path)}
    names = {"cert.json", "client.key", "server.key", KEYS_OF_SITES, KEYS_OF_SERVER}
    assert secret == dict.fromkeys(names, 0o600)
    assert (tmp_path / "kits").stat().st_mode & 0o777 == 0o700
    server = (kits["localhost"] / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in server and str(kits["localhost"] / "storage") in server
    for name, file in (("localhost", "fed_server.json"), ("north", "fed_client.json")):
        start = (kits[name] / "startup" / file).read_text()
        assert '"mtls"' in start and "localhost:18102" in start


@pytest.mark.slow  # a provisioning
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")  # NVFlare opens a kit's files so
def test_kits_hold_the_keys_of_encryption(
    three: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kits = provision(tmp_path / "kits", "localhost:18102", ["north", "south"])
    files = {name: {path.name for path in (kit / "startup").glob("*.tenseal")} for name, kit in kits.items()}
    assert files == {
        "localhost": {KEYS_OF_SERVER},
        "north": {KEYS_OF_SITES},
        "south": {KEYS_OF_SITES},
        ADMIN: set(),
    }
    hidden = replace(three, averaged=Averaged(encrypted=True))
    monkeypatch.setattr("slidetl.federation.nvflare_app.collab", SimpleNamespace(fl_ctx=FLContext()))

    def read(kit: str, file: str) -> Cipher:
        manager = SecurityContentManager(str(kits[kit] / "startup"))
        monkeypatch.setattr(SecurityContentService, "security_content_manager", manager)
        cipher = _read_cipher(hidden, file)
        assert cipher is not None and _read_cipher(three, file) is None
        return cipher

    of_north, of_south = read("north", KEYS_OF_SITES), read("south", KEYS_OF_SITES)
    of_server = read("localhost", KEYS_OF_SERVER)
    sent_to = {"head.weight": np.zeros(3, np.float32)}
    sent = serialised(of_north.encrypt(sent_to, {"head.weight": np.ones(3, np.float32)}), sent_to)
    assert of_server.find_fault(sent, sent_to) is None
    mean = of_south.decrypt(of_server.add([sent, sent], [0.5, 0.5]), sent_to)
    np.testing.assert_allclose(mean["head.weight"], 1, atol=1e-5)
    with pytest.raises(FederationError, match="secret_key"):
        of_server.decrypt(sent, sent_to)
    keys = kits["north"] / "startup" / KEYS_OF_SITES
    keys.chmod(0o640)
    with pytest.raises(UsageError, match=f"others may read the secret key of the sites; chmod 600 {keys}"):
        read("north", KEYS_OF_SITES)
    (kits["localhost"] / "startup" / KEYS_OF_SERVER).chmod(0o644)  # no secret
    assert read("localhost", KEYS_OF_SERVER)
    keys.write_bytes(keys.read_bytes() + b" ")
    for kit in ("north", "localhost"):  # changed, and none
        with pytest.raises(UsageError, match=r"needs the keys of slidetl's kits \(Cannot load"):
            read(kit, KEYS_OF_SITES)


def test_a_job_carries_no_code_and_no_place(three: Federation, tmp_path: Path) -> None:
    make_recipe(three.to_dict(), tmp_path / "out").export(str(tmp_path / "job"))
    files = sorted(path.name for path in (tmp_path / "job").rglob("*") if path.is_file())
    assert files == ["config_fed_client.json", "config_fed_server.json", "meta.json"]
    client = next((tmp_path / "job").rglob("config_fed_client.json")).read_text()
    assert "manifest" not in client and str(three.sites["north"].cache) not in client
    named = [part["path"] for part in json.loads(client)["components"]]
    assert named == ["slidetl.federation.nvflare_app.Client"]
