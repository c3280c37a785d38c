"""``slidetl embed``: tiles to stored features."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from slidetl.cli.progress import Progress

SUMMARY = "embed every tile of a cache with a pretrained backbone, and store the features beside the tiles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("cache", type=Path, metavar="CACHE", help="the folder that 'slidetl tile' wrote")
    parser.add_argument("--backbone", default="mobilenetv3_small_050", help="any model that timm knows")
    parser.add_argument(
        "--pretrained",
        default="procedural",
        metavar="WEIGHTS",
        help="procedural (bundled), imagenet or hub (those published, downloaded unless they are on this "
        "machine), zoo://NAME (a model that 'slidetl zoo pull' brought), or a .safetensors or .pth file",
    )
    parser.add_argument(
        "--blocks",
        type=lambda text: text.split(","),
        default=[],
        metavar="B1,B2",
        help="inner blocks whose output, averaged over space, is stored too, as NAME.BLOCK",
    )
    # SUPPRESS: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--name",
        default=argparse.SUPPRESS,
        help="of the features, instead of the backbone's; tells weights of one network apart",
    )
    parser.add_argument(
        "--slides",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="ID",
        help="only these slides, instead of all in the cache",
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="tiles in one pass")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU if there is one",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="in which the network is computed; auto: bfloat16 on a GPU, else float32",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="embed anew what is there, from other weights too"
    )


def run(options: argparse.Namespace) -> int:
    """Embeds the tiles of every slide.

    Returns:
        0, or 1 if any slide failed.
    """
    from slidetl.models.backbones import BackboneSpec
    from slidetl.training.embed import EmbeddedSlide, embed_cache

    started = time.monotonic()
    with Progress("tiles", rate=True) as progress:

        def report(slide: EmbeddedSlide) -> None:
            state = slide.reason or ("embedded" if slide.is_new else "there already")
            progress.show(f"{slide.slide_id}: {slide.tiles} tiles, {state}")

        slides = embed_cache(
            options.cache,
            BackboneSpec(options.backbone, options.pretrained),
            options.blocks,
            name=getattr(options, "name", None),
            slide_ids=getattr(options, "slides", ()),
            batch_size=options.batch_size,
            device=options.device,
            precision=options.precision,
            overwrite=options.overwrite,
            on_plan=progress.start,
            on_batch=progress.advance,
            on_slide=report,
        )
    seconds = time.monotonic() - started
    failed = [slide for slide in slides if slide.reason]
    for slide in failed:
        print(f"failed: {slide.slide_id}: {slide.reason}", file=sys.stderr)
    new = [slide for slide in slides if slide.is_new]
    tiles = sum(slide.tiles for slide in new)
    kept = len(slides) - len(new) - len(failed)
    print(
        f"{len(slides)} slides: {len(new)} embedded, {kept} there already, {len(failed)} failed; "
        f"{tiles} tiles in {seconds:.1f} s ({tiles / seconds:.0f} tiles/s)"
    )
    return 1 if failed else 0
