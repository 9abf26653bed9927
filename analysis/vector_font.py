"""The letters of SVG and PDF figures: a cut of DejaVu Sans, which comes with matplotlib and is the same everywhere.

For every PDF matplotlib cuts out of the font the glyphs that it shows. Of DejaVu's 6,000 glyphs and their tables of
ligatures that is half of the time that a PDF takes: .21 s a figure, .10 s with this cut.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path

NAME = "Raysparse Sans"
FAMILY = (NAME, "DejaVu Sans")  # signs that the cut lacks, in a trial's name say, come from the whole font
_WHOLE = "DejaVu Sans"
_KEPT = (  # Unicode, first and last
    (0x20, 0x17F),  # Latin
    (0x370, 0x3FF),  # Greek
    (0x2010, 0x209C),  # punctuation, superscripts and subscripts
    (0x2190, 0x219F),  # arrows
    (0x2200, 0x22FF),  # mathematics
)


@functools.cache
def register() -> None:
    """Make matplotlib know the cut font, in a file that goes with this process; .1 s, once."""
    from fontTools import subset  # a requirement of matplotlib's
    from matplotlib import font_manager

    options = subset.Options(layout_features=[], name_IDs=["*"], hinting=False, notdef_outline=True)
    options.drop_tables += ["GDEF", "GPOS", "GSUB", "FFTM"]
    folder = tempfile.TemporaryDirectory(prefix="raysparse-font-")
    atexit.register(folder.cleanup)  # matplotlib reads the file again for every PDF
    path = Path(folder.name) / "sans.ttf"
    with subset.load_font(font_manager.findfont(_WHOLE, fallback_to_default=False), options) as font:
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=[sign for first, last in _KEPT for sign in range(first, last + 1)])
        cutter.subset(font)
        for record in font["name"].names:
            record.string = {1: NAME, 4: NAME, 6: NAME.replace(" ", ""), 16: NAME}.get(record.nameID, record.string)
        subset.save_font(font, str(path), options)
    font_manager.fontManager.addfont(str(path))
