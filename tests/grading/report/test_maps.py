from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib import colormaps

from slidetl.grading.explain import relative_attention
from slidetl.grading.report.maps import left_out_level0, maps_of
from tests.grading.report.conftest import Graded, explanation_of


def test_attention_is_relative_to_the_average_tile(graded: Graded) -> None:
    result = graded()
    contribution, attention = maps_of(result)
    assert (contribution.name, attention.name) == ("Contribution", "Attention")
    assert attention.values.mean() == pytest.approx(1, abs=1e-4)


def test_contributions_lie_evenly_about_zero(graded: Graded) -> None:
    result = graded()
    n_tiles = len(result.attention)
    contributions = np.zeros(n_tiles)
    contributions[:5] = np.array([-4, -2, 1, 4, 80]) / n_tiles  # times the number of tiles
    contributions[5 : 5 + n_tiles // 20] = 4 / n_tiles  # so that the 98 % lie within 4
    shown = maps_of(dataclasses.replace(result, explanation=explanation_of(contributions)))[0]
    np.testing.assert_allclose(shown.values[:5], [-4, -2, 1, 4, 80], rtol=1e-5)
    assert shown.values.mean() == pytest.approx(contributions.sum(), rel=1e-4)
    assert shown.shades[:5].tolist() == [0, 64, 159, 255, 255] and shown.shades[-1] == 128
    assert [place for place, _ in shown.ticks] == [0, 0.5, 1]
    assert [text for _, text in shown.ticks] == ["≤ −4", "0", "≥ 4"]
    assert shown.unit == "log-odds × tiles"
    assert f"is the latent score, {1.2 + contributions.sum():.2f}, less 1.20," in shown.description
    in_grades = dataclasses.replace(explanation_of(contributions), unit="grades")  # of a regression
    assert "lowers (blue) the slide's latent score (grades from 0), times" in in_grades.description


def test_contributions_that_hardly_differ_look_alike(graded: Graded) -> None:
    result = graded()
    small = np.random.default_rng(0).normal(0, 0.05, len(result.attention)) / len(result.attention)
    shown = maps_of(dataclasses.replace(result, explanation=explanation_of(small)))[0]
    assert np.ptp(shown.shades) < 60 and shown.ticks[0] == (0, "≤ −1")


def test_the_scale_of_attention_is_even_in_powers_about_the_average(graded: Graded) -> None:
    result = graded()
    weights = np.full(len(result.attention), 1.0)
    weights[:4] = 9, 3, 1 / 3, 1e-4
    weights *= len(weights) / weights.sum()
    shown = maps_of(dataclasses.replace(result, attention=(weights / len(weights)).astype(np.float32)))[1]
    reach = weights[0]
    assert [text for _, text in shown.ticks] == [f"1/{reach:.2g}", "1", f"{reach:.2g}×"]
    expected = 127.5 * (1 + np.log(weights) / np.log(reach))
    np.testing.assert_allclose(shown.shades[:3], expected[:3], atol=0.51)
    assert shown.shades[3] == 0  # below the scale


def test_almost_even_attention_looks_even(graded: Graded) -> None:
    result = graded()
    even = np.full(len(result.attention), 1.0)
    even[::2] = 1.05
    shown = maps_of(dataclasses.replace(result, attention=(even / even.sum()).astype(np.float32)))[1]
    assert np.ptp(shown.shades) < 8 and abs(shown.shades.mean() - 127.5) < 3


def test_colours_are_those_of_the_named_scales(graded: Graded) -> None:
    contribution, attention = maps_of(graded())
    for shown, name in ((attention, "inferno"), (contribution, "RdBu_r")):
        assert shown.colours.shape == (256, 3)
        for index, position in ((0, 0.0), (255, 1.0)):
            np.testing.assert_allclose(shown.colours[index] / 255, colormaps[name](position)[:3], atol=0.01)


def test_a_model_that_weighs_all_tiles_alike_has_no_attention_to_show(graded: Graded) -> None:
    result = graded()
    flat = np.full_like(result.attention, 1 / len(result.attention))
    result = dataclasses.replace(result, attention=flat)
    assert relative_attention(result.attention) is None
    assert [shown.name for shown in maps_of(result)] == ["Contribution"]


def test_tiles_left_out_are_shown_with_their_reason(graded: Graded) -> None:
    result = graded()
    pen = result.plan.origins_level0[:3] + 10_000
    plan = dataclasses.replace(result.plan, left_out_level0={"pen": pen, "air": pen[:0]})
    result = dataclasses.replace(
        result,
        plan=plan,
        origins_level0=result.origins_level0[2:],
        attention=result.attention[2:],
        explanation=explanation_of(result.explanation.contributions[2:].astype(np.float64)),
    )
    found = left_out_level0(result)
    assert list(found) == ["pen", "unreadable"]
    np.testing.assert_array_equal(found["unreadable"], plan.origins_level0[:2])
    shown = maps_of(result)[-1]
    assert shown.categories == ("pen", "unreadable")
    assert shown.values.tolist() == shown.shades.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(shown.origins_level0[:3], pen)
