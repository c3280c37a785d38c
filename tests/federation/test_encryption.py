"""Encrypted updates, and rounds with them in one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.errors import FederationError, UsageError
from slidetl.federation.combine import CoordinateMedian, Krum, MultiKrum, TrimmedMean
from slidetl.federation.config import Averaged, Federation, Scheme
from slidetl.federation.coordinator import SitesHere, describe, run_rounds
from slidetl.federation.encryption import PLACES, Cipher, count_ciphertexts, make_keys, serialised
from slidetl.federation.participant import Participant
from slidetl.federation.privacy import Privacy
from slidetl.federation.records import read_arrays
from slidetl.federation.site import Parts
from slidetl.federation.weights import SiteUpdate, Weights, find_fault
from tests.federation.conftest import START
from tests.federation.test_coordinator import Make, Watched

tenseal = importlib.import_module("tenseal")  # without types

ENCRYPTED = Averaged(encrypted=True)


@pytest.fixture(scope="module")
def keys() -> tuple[bytes, bytes]:
    return make_keys()


@pytest.fixture(scope="module")
def cipher(keys: tuple[bytes, bytes]) -> Cipher:
    return Cipher.read(keys[0])


@pytest.fixture(scope="module")
def server(keys: tuple[bytes, bytes]) -> Cipher:
    return Cipher.read(keys[1])


def network(values: int = 5000, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "head.weight": rng.normal(size=(values, 1)).astype(np.float32),
        "norm.num_batches_tracked": np.array(seed, np.int64),
        "norm.running_mean": rng.normal(size=3),
    }


def moved(weights: Weights, seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: (value + 0.05 * rng.normal(size=value.shape)).astype(value.dtype)
        for name, value in weights.items()
    }


@pytest.mark.parametrize("values", [1, PLACES - 4, PLACES - 3, PLACES - 2, 2 * PLACES])
def test_the_decrypted_mean_is_the_weighted_mean(values: int, cipher: Cipher, server: Cipher) -> None:
    start = network(values)
    after = [moved(start, seed) for seed in (1, 2, 3)]
    shares = [0.5, 0.2, 0.3]
    sent = [serialised(cipher.encrypt(start, site), start) for site in after]
    assert {len(ciphertexts) for ciphertexts in sent} == {-(-(values + 3) // PLACES)}
    assert not [fault for ciphertexts in sent if (fault := server.find_fault(ciphertexts, start))]
    mean = cipher.decrypt(server.add(sent, shares), start)
    for name, value in start.items():
        assert mean[name].dtype == value.dtype and mean[name].shape == value.shape
        if name != "norm.num_batches_tracked":
            expected = np.tensordot(shares, np.stack([site[name].astype(np.float64) for site in after]), 1)
            np.testing.assert_allclose(mean[name], expected, rtol=0, atol=1e-6)
    assert mean["norm.num_batches_tracked"] == start["norm.num_batches_tracked"]


def test_the_server_cannot_decrypt(cipher: Cipher, server: Cipher, keys: tuple[bytes, bytes]) -> None:
    start = network()
    sent = serialised(cipher.encrypt(start, moved(start, 1)), start)
    summed = server.add([sent, sent], [0.5, 0.5])
    for ciphertexts in (sent, summed):
        with pytest.raises(FederationError, match=r"cannot be decrypted: .* secret_key"):
            server.decrypt(ciphertexts, start)
    assert tenseal.context_from(keys[0]).has_secret_key()
    assert not tenseal.context_from(keys[1]).has_secret_key()
    with pytest.raises(UsageError, match="expected keys"):
        Cipher.read(b"keys")


def test_an_update_looks_different_each_time(cipher: Cipher) -> None:
    start = network(8)
    first, second = (serialised(cipher.encrypt(start, start), start) for _ in range(2))
    assert first != second  # else the server could tell a site whose update repeats


def test_a_variance_does_not_become_negative_by_the_error(cipher: Cipher, server: Cipher) -> None:
    start = {"norm.running_var": np.zeros(200, np.float32), "head.weight": np.zeros(200, np.float32)}
    sent = serialised(cipher.encrypt(start, start), start)
    mean = cipher.decrypt(server.add([sent, sent], [0.5, 0.5]), start)
    assert (mean["head.weight"] < 0).any() and (mean["norm.running_var"] >= 0).all()


def test_a_variance_that_a_site_made_negative_is_found(cipher: Cipher, server: Cipher) -> None:
    start = {"norm.running_var": np.full(8, 0.1, np.float32)}
    sent = serialised(cipher.encrypt(start, {"norm.running_var": np.full(8, -1, np.float32)}), start)
    mean = cipher.decrypt(server.add([sent, sent], [0.5, 0.5]), start)
    assert find_fault(SiteUpdate("a", mean, 1), start) == "norm.running_var has negative variances"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2e5])
def test_a_site_encrypts_nothing_that_cannot_be_carried(bad: float, cipher: Cipher) -> None:
    start = network(8)
    after = moved(start, 1)
    after["head.weight"][3] = bad
    with pytest.raises(FederationError, match="this site sends nothing: a change is not finite or above"):
        cipher.encrypt(start, after)


def test_only_ciphertexts_become_bytes(cipher: Cipher) -> None:
    start = network(8)
    for wrong in (
        [b"P0012"],
        [np.zeros(11)],
        [tenseal.plain_tensor([0.0] * 11)],
        [],
        None,
        cipher.encrypt(start, start) * 2,
        cipher.encrypt(network(9), network(9)),
    ):
        with pytest.raises(FederationError, match="expected the ciphertexts of an update"):
            serialised(wrong, start)


def test_bad_ciphertexts_are_found(cipher: Cipher, server: Cipher) -> None:
    start = network(8)
    (good,) = serialised(cipher.encrypt(start, start), start)
    spent = server.add([[good], [good]], [0.5, 0.5])
    (short,) = serialised(cipher.encrypt(network(7), network(7)), network(7))
    other_scale = tenseal.ckks_vector(cipher._context, [0.0] * 11, 2**30).serialize()
    small = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 20, 40])
    small.global_scale = 2**40
    foreign = tenseal.ckks_vector(small, [0.0] * 11).serialize()
    assert server.find_fault([good], start) is None and count_ciphertexts(start) == 1
    for wrong, reason in (
        (None, "expected 1 ciphertexts"),
        ([], "expected 1 ciphertexts"),
        ([good, good], "expected 1 ciphertexts"),
        (good, "expected 1 ciphertexts"),
        (["text"], "is not one of at most"),
        ([good * 2], "is not one of at most"),
        ([b""], "1 of 1 has another form"),
        ([b"junk"], "1 of 1 is not usable"),
        ([good[:-9]], "1 of 1 is not usable"),
        ([foreign], "1 of 1 is not usable"),
        (spent, "1 of 1 is not usable"),
        ([other_scale], "1 of 1 has another form"),
        ([short], "1 of 1 has another form"),
    ):
        assert reason in str(server.find_fault(wrong, start)), reason


def test_a_sum_with_other_keys_is_refused(cipher: Cipher, server: Cipher) -> None:
    start = network(8)
    stranger = Cipher.read(make_keys()[0])
    sent = [serialised(key.encrypt(start, start), start) for key in (cipher, stranger)]
    assert [server.find_fault(ciphertexts, start) for ciphertexts in sent] == [None, None]
    summed = server.add(sent, [0.5, 0.5])
    for key in (cipher, stranger):
        with pytest.raises(FederationError, match="a site has other keys"):
            key.decrypt(summed, start)
    with pytest.raises(FederationError, match="expected a sum of 12 values, not 11"):
        cipher.decrypt(summed, network(9))


@pytest.mark.parametrize(
    ("scheme", "averaged", "told"),
    [
        ("cyclic", {}, "scheme must be averaged, not cyclic"),
        ("peer_to_peer", {}, "scheme must be averaged, not peer_to_peer"),
        ("local", {}, "scheme must be averaged, not local"),
        ("averaged", {"rule": CoordinateMedian(1)}, "rule must be WeightedMean, .* not CoordinateMedian"),
        ("averaged", {"rule": TrimmedMean(1)}, "rule must be WeightedMean, .* not TrimmedMean"),
        ("averaged", {"rule": Krum()}, "rule must be WeightedMean, .* not Krum"),
        ("averaged", {"rule": MultiKrum()}, "rule must be WeightedMean, .* not MultiKrum"),
    ],
)
def test_encryption_is_refused_where_the_server_cannot_add(
    scheme: Scheme, averaged: dict[str, Any], told: str, three: Federation
) -> None:
    with pytest.raises(UsageError, match=f"averaged.*: .*{told}"):
        replace(three, scheme=scheme, averaged=Averaged(**averaged, encrypted=True))


@pytest.fixture
def encrypting(adders: Make, cipher: Cipher) -> Make:
    def make(federation: Federation) -> SitesHere:
        return with_keys(adders(federation), cipher)

    return make


def with_keys(sites: SitesHere, cipher: Cipher) -> SitesHere:
    for participant in sites.participants.values():
        participant.cipher = cipher
    return sites


def run(federation: Federation, sites: Any, output: Path, server: Cipher) -> list[dict[str, Any]]:
    accounts: list[dict[str, Any]] = []
    run_rounds(federation, sites, output, accounts.append, server)
    return accounts


def differ(one: Path, other: Path, number: int = 2) -> float:
    first, second = (read_arrays(folder / "rounds" / f"000{number}.safetensors") for folder in (one, other))
    assert {name: value.dtype for name, value in first.items()} == {n: v.dtype for n, v in second.items()}
    # The adders' changes are several units, of which CKKS loses 7e-7.
    return max(
        float((np.abs(first[name] - second[name]) / (1 + np.abs(first[name]))).max()) for name in first
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_encrypted_rounds_are_those_in_the_clear(
    momentum: float, three: Federation, adders: Make, encrypting: Make, server: Cipher, tmp_path: Path
) -> None:
    sites = {
        name: replace(site, examples=1 + place) for place, (name, site) in enumerate(three.sites.items())
    }
    clear = replace(three, sites=sites, averaged=Averaged(momentum=momentum))
    hidden = replace(clear, averaged=Averaged(momentum=momentum, encrypted=True))
    came: dict[str, list[Any]] = {}

    def note(site: str, message: str, answer: Any) -> Any:
        came.setdefault(message, []).append(answer)
        return answer

    run(clear, adders(clear), tmp_path / "clear", server)
    accounts = run(hidden, Watched(encrypting(hidden), note), tmp_path / "hidden", server)
    assert differ(tmp_path / "clear", tmp_path / "hidden") < 1e-6
    assert [account["used"] for account in accounts] == [["north", "south", "west"]] * 2
    assert accounts[0]["notes"].keys() == three.sites.keys()  # claims of four examples are capped
    assert accounts[0]["trained"]["south"] == {"train_loss": 2.0}
    for answer in came["train"]:
        assert answer.keys() == {"ciphertexts", "counters", "examples", "metrics"}
        assert answer["counters"].keys() == {"norm.num_batches_tracked"}
        assert [type(content) for content in answer["ciphertexts"]] == [bytes]
    assert all(answer.keys() == {"weights"} for answer in came["decrypt"]) and len(came["decrypt"]) == 6


def test_the_hash_of_a_federation_in_the_clear_is_as_before_encryption(three: Federation) -> None:
    assert "encrypted" not in three.to_dict()["averaged"]
    assert replace(three, averaged=ENCRYPTED).sha256 != three.sha256


Change = Callable[[str, str, Any], Any]


def spoil(kind: str, *sites: str) -> Change:
    def change(site: str, message: str, answer: Any) -> Any:
        if site not in sites:
            return answer
        if message == "decrypt":
            weights = answer["weights"]
            if kind == "lie":
                return {"weights": {**weights, "head.weight": weights["head.weight"] + np.float32(0.01)}}
            if kind == "nan mean":
                return {"weights": {**weights, "head.weight": weights["head.weight"] * np.float32(np.nan)}}
            if kind == "shape":
                return {"weights": {**weights, "head.weight": np.zeros(3, np.float32)}}
            if kind == "list":
                return [answer]
            if kind == "no weights":
                return {}
        if message == "train":
            if kind == "junk":
                return {**answer, "ciphertexts": [b"junk"]}
            if kind == "none":
                return {name: value for name, value in answer.items() if name != "ciphertexts"}
            if kind == "clear":
                return {**answer, "weights": dict(START), "counters": None}
            if kind == "counter":
                return {**answer, "counters": {"norm.num_batches_tracked": np.array(0.5)}}
            if kind == "examples":
                return {**answer, "examples": -1}
        return answer

    return change


@pytest.mark.parametrize("kind", ["junk", "none", "clear", "counter", "examples", "lost"])
def test_a_bad_site_is_left_out_of_the_sum(
    kind: str, three: Federation, adders: Make, encrypting: Make, server: Cipher, tmp_path: Path
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    gone = lambda site, message: kind == "lost" and site == "south"  # noqa: E731
    accounts = run(
        hidden, Watched(encrypting(hidden), spoil(kind, "south"), gone), tmp_path / "hidden", server
    )
    for account in accounts:
        assert account["used"] == ["north", "west"] and "south" in account["left_out"]
        assert account["trained"].keys() == {"north", "west"} and "south left out: " in describe(account, 2)
    absent = Watched(adders(three), lost=lambda site, message: site == "south")
    run(three, absent, tmp_path / "clear", server)
    assert differ(tmp_path / "clear", tmp_path / "hidden") < 1e-6


def test_a_site_with_nan_sends_nothing(
    three: Federation, encrypting: Make, server: Cipher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    sites = encrypting(hidden)
    train = sites.participants["south"].trainer.train

    def diverged(weights: Weights, number: int) -> SiteUpdate:
        update = train(weights, number)
        return replace(
            update, weights={**update.weights, "norm.running_mean": np.full(3, np.nan, np.float32)}
        )

    monkeypatch.setattr(sites.participants["south"].trainer, "train", diverged)
    account = run(hidden, sites, tmp_path, server)[0]
    assert account["left_out"]["south"].startswith("failed with FederationError")
    assert account["used"] == ["north", "west"]


@pytest.mark.parametrize("kind", ["lie", "nan mean", "shape", "list", "no weights", "lost"])
def test_most_sites_agree_on_the_mean(
    kind: str, three: Federation, encrypting: Make, server: Cipher, tmp_path: Path
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    honest = run(hidden, encrypting(hidden), tmp_path / "honest", server)
    gone = lambda site, message: (kind, site, message) == ("lost", "north", "decrypt")  # noqa: E731
    accounts = run(
        hidden, Watched(encrypting(hidden), spoil(kind, "north"), gone), tmp_path / "lying", server
    )
    for account in accounts:  # its update counts: the server has it
        assert account["used"] == honest[0]["used"]
        assert account["notes"]["north"].startswith("did not decrypt the mean: ")
    assert differ(tmp_path / "honest", tmp_path / "lying") < 1e-6


@pytest.mark.parametrize("kind", ["lie", "nan mean", "lost"])
def test_without_agreement_the_last_network_stands(
    kind: str, three: Federation, encrypting: Make, server: Cipher, tmp_path: Path
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    first = replace(hidden, rounds=1)
    run(first, encrypting(first), tmp_path, server)
    (tmp_path / "rounds" / "0001.json").write_text(
        (tmp_path / "rounds" / "0001.json").read_text().replace(first.sha256, hidden.sha256)
    )
    before = (tmp_path / "rounds" / "0001.safetensors").read_bytes()
    gone = lambda site, message: kind == "lost" and message == "decrypt" and site != "west"  # noqa: E731
    sites = Watched(encrypting(hidden), spoil(kind, "north", "south"), gone)
    # Two that lie are the most: so their lies differ.
    if kind == "lie":
        lie = sites.change
        sites.change = lambda site, message, answer: (
            lie(site, message, lie(site, message, answer)) if site == "north" else lie(site, message, answer)
        )
    with pytest.raises(FederationError, match=r"round 2: 1 of 3 sites agree on the decrypted mean \(north: "):
        run(hidden, sites, tmp_path, server)
    assert (tmp_path / "rounds" / "0001.safetensors").read_bytes() == before
    assert not (tmp_path / "rounds" / "0002.json").exists()


def test_a_sum_of_one_site_is_refused(
    three: Federation, encrypting: Make, server: Cipher, tmp_path: Path
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    sites = Watched(encrypting(hidden), lost=lambda site, message: site != "west")
    with pytest.raises(
        FederationError, match=r"needs 2 usable updates, since .*1 of 3 sites sent one.*north"
    ):
        run(hidden, sites, tmp_path, server)
    assert ("west", "decrypt") not in sites.asked


def test_a_site_decrypts_a_round_once_and_with_others(
    three: Federation, encrypting: Make, server: Cipher, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    north = encrypting(hidden).participants["north"]
    sent = north.train(START, 1)["ciphertexts"]
    summed = server.add([sent, sent], [0.5, 0.5])

    def ask(number: int = 1, present: tuple[str, ...] = ("north", "west")) -> Any:
        return north.decrypt(summed, number, present)

    assert ask(2) == {"failed": "FederationError"}
    assert ask(present=("north",)) == ask(present=("north", "north")) == {"failed": "FederationError"}
    assert ask(present=("south", "west")) == ask(present=("north", "east")) == {"failed": "FederationError"}
    assert "weights" in ask()
    assert ask() == {"failed": "FederationError"}
    assert "has done so already" in capsys.readouterr().out


def test_without_keys_nothing_is_sent_in_the_clear(
    three: Federation, adders: Make, server: Cipher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = replace(three, averaged=ENCRYPTED)
    answers, _ = adders(hidden).ask(["north"], "train", weights=START, number=1)
    assert answers == {"north": {"failed": "FederationError"}}
    assert "no keys for averaged.encrypted" in capsys.readouterr().out
    with pytest.raises(UsageError, match="needs keys of the server"):
        run_rounds(hidden, adders(hidden), tmp_path, print)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"travel": "all-but-normalisation", "proximal": 0.1},
        {"travel": "all"},
    ],
    ids=["FedBN and FedProx", "all"],
)
def test_real_networks_are_those_in_the_clear(
    options: dict[str, Any],
    three: Federation,
    parts_of: dict[str, Parts],
    cipher: Cipher,
    server: Cipher,
    tmp_path: Path,
) -> None:
    for name, averaged in (("clear", Averaged()), ("hidden", ENCRYPTED)):
        federation = replace(three, averaged=averaged, rounds=1, **options)
        sites = SitesHere(
            {
                site: Participant(federation, site, parts_of[site], tmp_path / name / site)
                for site in three.sites
            }
        )
        run(federation, with_keys(sites, cipher), tmp_path / name, server)
    assert differ(tmp_path / "clear", tmp_path / "hidden", 1) < 1e-6


@pytest.mark.slow
def test_noise_on_updates_comes_before_the_encryption(
    three: Federation, sites_here: Make, cipher: Cipher, server: Cipher, tmp_path: Path
) -> None:
    privacy = Privacy("site", clip=0.01, noise=1e-6, delta=1e-3)
    federation = replace(three, averaged=ENCRYPTED, privacy=privacy, rounds=2, travel="all-but-normalisation")
    accounts = run(federation, with_keys(sites_here(federation), cipher), tmp_path, server)
    assert all("epsilon" in metrics for account in accounts for metrics in account["trained"].values())
    one, two = (read_arrays(tmp_path / "rounds" / f"000{number}.safetensors") for number in (1, 2))
    norm = np.sqrt(sum(np.square(two[name] - one[name], dtype=np.float64).sum() for name in one))
    assert 0.001 < norm <= 0.0101  # clipped at each site
