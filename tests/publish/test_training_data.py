from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from slidetl.analysis.novelty import fit_familiar
from slidetl.data.record import StudyRecord
from slidetl.data.study import read_study
from slidetl.errors import CacheMismatchError, UsageError
from slidetl.models.aggregators import MeanPooling
from slidetl.models.runner import Runner
from slidetl.models.spec import BackboneSpec
from slidetl.publish.export import build_network
from slidetl.publish.training_data import (
    describe_training,
    learn_familiar,
    training_slides,
    training_studies,
)
from slidetl.training.checkpoint import load_grader
from slidetl.training.grader import SlideGrader
from tests.conftest import Study


def test_an_export_says_if_the_training_saw_regions_only(study: Study) -> None:
    one, other, *_ = read_study(study.manifest, study.cache).slides
    header = replace(one.cache.header, regions="ab" * 32)
    confined = replace(one, cache=replace(one.cache, header=header))
    with pytest.warns(UserWarning, match="1 of 2 training slides have tiles of --regions only"):
        found = describe_training([confined, other])
    assert found == describe_training([one, other])
    header = replace(one.cache.header, location_mm=(1.0, 2.0, 3.0))
    placed = replace(one, cache=replace(one.cache, header=header))
    with pytest.warns(UserWarning, match="1 of 2 training slides are patches around places in a series"):
        assert describe_training([placed, other]) == found


def test_the_area_of_tissue_goes_by_the_spacing_really_read(study: Study) -> None:
    one, *_ = read_study(study.manifest, study.cache).slides
    header = replace(one.cache.header, mpp_read=(6.0, 5.0))  # within a tolerance of 0.5 of 4.0
    found = [
        describe_training([replace(one, cache=replace(one.cache, header=about))]).least_tissue_mm2
        for about in (header, one.cache.header)
    ]
    x, y = one.cache.mpp_read
    assert found[0] == pytest.approx(found[1] * 30 / (x * y))


def test_training_slides_are_tiled_as_for_the_checkpoint(study: Study, tmp_path: Path) -> None:
    slides = read_study(study.manifest, study.cache).slides
    grader = SlideGrader(BackboneSpec("mobilenetv3_small_050"), MeanPooling)
    grader.record = StudyRecord.of({"train": slides, "val": (), "test": (), "predict": slides})
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{manifest: {study.manifest}, cache: {study.cache}}}\n")
    for spec in (slides[0].cache.spec, None):  # older checkpoints do not say
        grader.tile_spec = spec
        studies = training_studies([config], [grader])
        assert len(training_slides(studies, [grader])) == len(slides)
    grader.tile_spec = replace(slides[0].cache.spec, mpp=2.0)
    with pytest.raises(CacheMismatchError, match=r"made with mpp 4.0 \(wanted: 2.0\) by the checkpoint;"):
        training_studies([config], [grader])


@pytest.mark.slow
@pytest.mark.parametrize("packs", [False, True])
def test_a_gpu_describes_the_training_in_one_shape(
    study: Study, trained: Path, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    network, shapes = build_network([grader])[0], []
    slides, count = read_study(study.manifest, study.cache).slides[:6], 10
    rows = [np.linspace(0, len(slide.cache) - 1, count).round().astype(int) for slide in slides]
    read = [slide.cache.read(tiles) for slide, tiles in zip(slides, rows, strict=True)]
    with torch.inference_mode():
        means = [network.embed(torch.from_numpy(tiles).permute(0, 3, 1, 2)).mean(0) for tiles in read]
    expected = fit_familiar(torch.stack(means).double().numpy(), [slide.row.patient_id for slide in slides])
    backbone = network.networks[0].backbone
    backbone.register_forward_pre_hook(lambda _, tiles: shapes.append(tuple(tiles[0].shape)))
    monkeypatch.setattr("slidetl.publish.training_data.Runner", partial(Runner, packs=packs))
    found = learn_familiar(network, slides, count)
    assert set(shapes) == {(count, 3, 64, 64)} and len(shapes) >= len(slides)
    assert found.limit == pytest.approx(expected.limit, rel=1e-4)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)


@pytest.mark.slow
def test_a_network_that_tells_no_slides_apart_is_not_exported(
    study: Study, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    network = build_network([grader])[0]
    embed = network.embed
    monkeypatch.setattr(network, "embed", lambda tiles: embed(tiles) * 0)
    with pytest.raises(UsageError, match="all 6 training slides get the same probabilities"):
        learn_familiar(network, read_study(study.manifest, study.cache).slides[:6], 4)
