from __future__ import annotations

from dataclasses import replace

import pytest

from slidetl.data.study import read_study
from slidetl.publish.training_data import describe_training
from tests.conftest import Study


def test_an_export_says_if_the_training_saw_regions_only(study: Study) -> None:
    one, other, *_ = read_study(study.manifest, study.cache).slides
    header = replace(one.cache.header, regions="ab" * 32)
    confined = replace(one, cache=replace(one.cache, header=header))
    with pytest.warns(UserWarning, match="1 of 2 training slides have tiles of --regions only"):
        found = describe_training([confined, other])
    assert found == describe_training([one, other])
