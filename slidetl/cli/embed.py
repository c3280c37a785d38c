"""``slidetl embed``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from slidetl.cli.progress import Progress
from slidetl.models.spec import BackboneSpec
from slidetl.processor import postpone_collection
from slidetl.text import one_line
from slidetl.training.options import EmbedOptions


def embed(
    cache: Path,
    *,
    backbone: BackboneSpec,
    options: EmbedOptions,
) -> int:
    """Embeds every tile of a cache with a pretrained backbone, and stores the features beside the tiles.

    Exit code 1 if any slide failed.

    Args:
        cache: folder of 'slidetl tile'.
        backbone: the network and its weights; 'slidetl backbones' lists some.
        options: of embedding and storing.
    """
    with postpone_collection(of_a_command=True):
        from slidetl.training.embed import EmbeddedSlide, embed_cache

    started = time.monotonic()
    with Progress("tiles", stage="embedding", rate=True) as progress:

        def report(slide: EmbeddedSlide) -> None:
            state = slide.reason or ("embedded" if slide.is_new else "there already")
            progress.show(f"{slide.slide_id}: {slide.tiles} tiles, {state}")

        slides = embed_cache(
            cache,
            backbone,
            options,
            on_plan=progress.start,
            on_batch=progress.advance,
            on_slide=report,
            on_rates=lambda rates: progress.show(str(rates)),
        )
    seconds = time.monotonic() - started
    failed = [slide for slide in slides if slide.reason]
    for slide in failed:
        print(one_line(f"failed: {slide.slide_id}: {slide.reason}"), file=sys.stderr)
    new = [slide for slide in slides if slide.is_new]
    tiles = sum(slide.tiles for slide in new)
    kept = len(slides) - len(new) - len(failed)
    print(
        f"{len(slides)} slides: {len(new)} embedded, {kept} there already, {len(failed)} failed; "
        f"{tiles} tiles in {seconds:.1f} s ({tiles / seconds:.0f} tiles/s)"
    )
    return 1 if failed else 0
