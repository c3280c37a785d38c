"""Formats that are not read, with a converter for each; docs/reference/slides.md has the same table."""

from __future__ import annotations

from pathlib import Path

_BIO_FORMATS = "Bio-Formats' bfconvert, or bioformats2raw to OME-Zarr"
# By suffix: the format, and what converts it.
UNREAD = {
    ".isyntax": ("Philips iSyntax", "isyntax2raw to OME-Zarr, or libisyntax' isyntax-to-tiff"),
    ".i2syntax": ("Philips iSyntax", "isyntax2raw to OME-Zarr, or libisyntax' isyntax-to-tiff"),
    ".vsi": ("Olympus VSI", f"QuPath, {_BIO_FORMATS}"),
    ".ets": ("the pixels of an Olympus VSI", f"QuPath, {_BIO_FORMATS}, from the .vsi"),
    ".kfb": ("KFBIO KFB", "the converter of KFBIO's viewer, to .svs or .tif"),
    ".sdpc": ("Sqray SDPC", "the vendor's converter, to .svs"),
    ".mds": ("Motic MDS", "the vendor's viewer, to .svs"),
    ".mdsx": ("Motic MDSX", "the vendor's viewer, to .svs"),
    ".tmap": ("UNIC TMAP", "the vendor's viewer, to .svs"),
    ".lif": ("Leica LIF", _BIO_FORMATS),
    ".nd2": ("Nikon ND2", _BIO_FORMATS),
    ".oir": ("Olympus OIR", _BIO_FORMATS),
    ".zvi": ("Zeiss ZVI", _BIO_FORMATS),
    ".jp2": ("JPEG 2000", "a converter to tiled TIFF"),
    ".czi": ("this kind of Zeiss CZI", f"{_BIO_FORMATS} (RGB, uncompressed or zstd, is read)"),
    ".dcm": ("this kind of DICOM", "the scanner's export (a whole slide, explicit little endian, is read)"),
    ".zarr": ("a zarr without the multiscales of an OME-Zarr", _BIO_FORMATS),
}


def describe_unread(path: Path) -> str:
    """Names the format of a file that is not read, and a converter; empty if its suffix is not known."""
    if path.suffix.lower() not in UNREAD:
        return ""
    name, converter = UNREAD[path.suffix.lower()]
    return f"{name} is not read: convert it by {converter}"
