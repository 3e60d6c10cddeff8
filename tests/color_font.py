"""A small colour font, made here, so that no test needs one of the machine."""

import io

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import (
    BitmapSizeTable,
    SbitLineMetrics,
    Strike,
    eblc_index_sub_table_1,
)
from PIL import Image

EM, WIDE, HIGH = 1024, 20, 16


def write_color_font(path, colour_by_sequence):
    """Write a font with a picture of one colour for each sequence of code points."""
    order, cmap, rules = [".notdef"], {}, []
    for code in sorted({ord(c) for sequence in colour_by_sequence for c in sequence}):
        cmap[code] = f"u{code:X}"
        order.append(cmap[code])
    drawn = {}
    for sequence, colour in colour_by_sequence.items():
        parts = [cmap[ord(c)] for c in sequence]
        name = parts[0] if len(parts) == 1 else "_".join(parts)
        if len(parts) > 1:
            order.append(name)
            rules.append(f"sub {' '.join(parts)} by {name};")
        drawn[name] = colour
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(cmap)
    builder.setupGlyf({name: _outline() for name in order})
    builder.setupHorizontalMetrics({name: (EM * WIDE // HIGH, 0) for name in order})
    builder.setupHorizontalHeader(ascent=EM, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    rules.sort(key=len, reverse=True)
    feature = "feature ccmp {\n" + "\n".join(rules) + "\n} ccmp;"
    addOpenTypeFeaturesFromString(builder.font, feature)
    _add_bitmaps(builder.font, drawn)
    builder.save(path)


def _outline():
    from fontTools.ttLib.tables._g_l_y_f import Glyph

    return Glyph()


def _add_bitmaps(font, drawn):
    names = sorted(drawn, key=font.getGlyphID)
    bitmaps = {}
    for name in names:
        png = io.BytesIO()
        Image.new("RGBA", (WIDE, HIGH), drawn[name]).save(png, format="PNG")
        glyph = cbdt_bitmap_format_17(b"", font)
        glyph.metrics = SmallGlyphMetrics()
        glyph.metrics.height, glyph.metrics.width = HIGH, WIDE
        glyph.metrics.BearingX, glyph.metrics.BearingY = 0, HIGH
        glyph.metrics.Advance = WIDE
        glyph.imageData = png.getvalue()
        bitmaps[name] = glyph
    data = newTable("CBDT")
    data.version, data.strikeData = 3.0, [bitmaps]
    font["CBDT"] = data
    strike = Strike()
    strike.bitmapSizeTable = size = BitmapSizeTable()
    for way in ("hori", "vert"):
        line = SbitLineMetrics()
        for field in (
            *("ascender", "descender", "widthMax", "caretSlopeNumerator"),
            *("caretSlopeDenominator", "caretOffset", "minOriginSB", "minAdvanceSB"),
            *("maxBeforeBL", "minAfterBL", "pad1", "pad2"),
        ):
            setattr(line, field, 0)
        line.ascender, line.widthMax = HIGH, WIDE
        setattr(size, way, line)
    ids = [font.getGlyphID(name) for name in names]
    size.startGlyphIndex, size.endGlyphIndex = min(ids), max(ids)
    size.ppemX, size.ppemY, size.bitDepth, size.flags = HIGH, HIGH, 32, 1
    size.colorRef = 0
    table = eblc_index_sub_table_1(b"", font)
    table.names, table.imageFormat, table.indexFormat = names, 17, 1
    strike.indexSubTables = [table]
    places = newTable("CBLC")
    places.version, places.strikes = 3.0, [strike]
    font["CBLC"] = places
