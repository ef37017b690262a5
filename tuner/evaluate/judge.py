"""The exact judge: reads a picture of the shapes world back into its attributes. Rules, nothing trained."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from tuner.evaluate import outlines, templates
from tuner.evaluate.render import DARK_END, LIGHT_END
from tuner.evaluate.world import BACKGROUNDS, COLOURS, RARE_STYLE, SIDE, SIZES, place_at

Picture = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]

ZOOM = 2  # masks are found on a picture enlarged by this
FAINT = 13.0  # Lab distance from the background below which a pixel is background
PEAK = 24.0  # an object's strongest pixels are at least this far from the background
SMALLEST = 45.0  # pixels inside the outer contour; less is a speck, not an object
RINGS = 50  # rows of a polar picture, from the centre to the radius
MOST = 8  # objects read at most, the largest first
LEAST_OVERLAP = 0.75  # with the best template; below it the object has no shape
FARTHEST_BACKGROUND = 25.0  # Lab distance to the nearest named background
BLUR_DEPTH = 1.6  # pixels from the contour from which a filled object shows its own colour
STROKE_DEPTH = 3.0  # the same for the texture of a stroked one
DIAGONALS = (*range(-57, -32, 3), *range(33, 58, 3))  # degrees: where the lines of hatched objects run
AXES = (*range(-19, 20, 3), *range(71, 110, 3))  # where the rows of dots run
STROKED = ("outlined", "hatched", RARE_STYLE)
_STROKE = {"outlined": 2.6, "hatched": 1.9, RARE_STYLE: 1.7}  # usual line widths of the contour, pixels


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object as read. shape: None when it is like no shape; x, y: centroid; radius: pixels of 128.

    overlap: intersection over union with the best template, in [0, 1].
    """

    shape: str | None
    colour: str
    size: str
    x: float
    y: float
    radius: float
    style: str
    overlap: float

    @property
    def place(self) -> str:
        """The word for its cell of the 3x3 grid."""
        return place_at(self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A picture as read. background: None when it is like none; style: None when there is no object."""

    background: str | None
    style: str | None
    objects: tuple[Seen, ...]


def _lab(rgb: Array) -> Array:
    """RGB in [0, 255], [..., 3] -> CIE Lab with L in [0, 100]."""
    flat = np.ascontiguousarray(rgb, np.float32).reshape(1, -1, 3) / np.float32(255)
    return np.asarray(cv2.cvtColor(flat, cv2.COLOR_RGB2LAB), np.float32).reshape(rgb.shape)


@functools.cache
def _terms() -> Array:
    """1, x, y, x2 + y2 for every pixel: [SIDE * SIDE, 4], x and y in [-1, 1]."""
    yy, xx = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5) / (SIDE / 2) - 1
    return np.stack([np.ones_like(xx), xx, yy, xx * xx + yy * yy], axis=-1).reshape(-1, 4)


def _ground(rgb: Array) -> Array:
    """The background under the whole picture: a plane with a vignette fitted to pixels like the border's."""
    edge = np.concatenate([rgb[:4].reshape(-1, 3), rgb[-4:].reshape(-1, 3), rgb[:, :4].reshape(-1, 3)])
    edge = np.concatenate([edge, rgb[:, -4:].reshape(-1, 3)])
    median = np.median(edge, axis=0)
    terms = _terms()
    some, at = (
        rgb.reshape(-1, 3)[::5],
        terms[::5],
    )  # a fifth of the pixels, spread over all columns, is enough
    solved = np.zeros((terms.shape[1], 3), np.float32)
    solved[0] = median
    for limit in (40.0, 18.0):
        off = np.abs(some - at @ solved)
        like = (off[:, 0] < limit) & (off[:, 1] < limit) & (off[:, 2] < limit)
        if like.sum() < 200:
            break
        solved = np.asarray(np.linalg.lstsq(at[like], some[like], rcond=None)[0], np.float32)
    return np.asarray(terms @ solved, np.float32).reshape(rgb.shape)


def _nearest_background(colour: Array) -> str | None:
    names = tuple(BACKGROUNDS)
    wanted = _lab(np.array([BACKGROUNDS[name] for name in names], np.float32))
    far = np.linalg.norm(wanted - _lab(colour.reshape(1, 3)), axis=1)
    best = int(far.argmin())
    return names[best] if far[best] <= FARTHEST_BACKGROUND else None


def _filled(strong: Mask) -> list[tuple[float, Mask]]:
    """The filled outer contours of a mask, largest first: area in pixels of 128, mask of 0 and 1."""
    found = cv2.findContours(strong, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    masks = []
    for contour in sorted(found, key=cv2.contourArea, reverse=True)[:MOST]:
        mask = np.zeros_like(strong)
        cv2.drawContours(mask, [contour], -1, 1, cv2.FILLED)
        masks.append((float(mask.sum()) / ZOOM**2, mask))
    return sorted(masks, key=lambda pair: -pair[0])


def _closed(strong: npt.NDArray[np.bool_]) -> Mask:
    """A mask whose gaps of about two pixels are closed: 0 and 1."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    return np.asarray(cv2.morphologyEx(np.asarray(strong, np.uint8), cv2.MORPH_CLOSE, kernel), np.uint8)


def _masks(contrast: Array) -> list[Mask]:
    """The filled mask of each object, largest first. contrast: Lab distance from background, [128, 128]."""
    big = cv2.resize(contrast, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    first = _closed(big > FAINT)
    masks = []
    for area, mask in _filled(first):
        if area < SMALLEST:
            break
        strongest = float(np.percentile(big[mask > 0], 85))
        if strongest < PEAK:
            continue
        # A contour lies where its contrast is half; what is weaker is blur around it.
        level = max(FAINT, 0.5 * strongest)
        inner = _filled(_closed((big > level) & (mask > 0)))
        if inner and inner[0][0] >= SMALLEST and inner[0][0] >= 0.5 * area:
            mask = inner[0][1]
        masks.append(mask)
    return masks


@dataclasses.dataclass(frozen=True)
class _Inside:
    """Measures of an object's inside. count: pixels of it.

    cover: mean share of paint; deep: the same far from the contour; rough: deviation of that share from a
    plane; diagonal: how much more of it diagonal lines explain than lines along rows or columns, -1 to 1;
    slope: change of lightness over a radius. colour: the median, RGB [3]; paint: the strongest pixels less
    the background, RGB [3].
    """

    count: int
    cover: float
    deep: float
    rough: float
    diagonal: float
    slope: float
    colour: Array
    paint: Array


def _is_ring(polar: Array) -> bool:
    """Whether a round object has an empty middle with paint all around it at half the radius.

    polar: the cover by radius (rows, RINGS to the radius) and direction (columns).
    """
    empty = float(polar[: round(0.28 * RINGS)].mean())
    rim = polar[round(0.42 * RINGS) : round(0.62 * RINGS)]
    peak = float(np.percentile(rim, 20, axis=1).max())  # dots and lines have gaps on the way around
    return empty < 0.55 * peak and peak - empty > 0.15


def _ripple(polar: Array) -> float:
    """How much the cover between a ring's contours changes on the way around: root mean square."""
    band = polar[round(0.68 * RINGS) : round(0.78 * RINGS)].mean(axis=0)
    waves = np.abs(np.fft.rfft(band)) / (len(band) / 2)
    return float(np.sqrt((waves[5:20] ** 2).sum() / 2))  # fewer waves come from place and aspect


def _along(values: Array, xx: npt.NDArray[np.intp], yy: npt.NDArray[np.intp], angles: Iterable[int]) -> float:
    """The share of the values' variance that lines at one of these angles explain, at most 1.

    values, xx, yy: [n]; corrected for the number of lines (adjusted R squared), so that noise gives about 0.
    """
    total, best = float(((values - values.mean()) ** 2).sum()), 0.0
    for degrees in angles:
        angle = math.radians(degrees)
        line = np.round(xx * math.sin(angle) - yy * math.cos(angle)).astype(np.int64)
        line -= line.min()
        count = np.bincount(line)
        sums = np.bincount(line, values)[count > 0]
        between = float((sums**2 / count[count > 0]).sum()) - len(values) * float(values.mean()) ** 2
        spare = len(values) - len(sums)
        if total > 0 and spare > 0:
            best = max(best, 1 - (total - between) / total * (len(values) - 1) / spare)
    return best


def _less_plane(values: Array, xx: npt.NDArray[np.intp], yy: npt.NDArray[np.intp]) -> tuple[Array, float]:
    """Values [n] at places xx, yy [n] less the plane that fits them best, and its slope per pixel."""
    terms = np.stack([np.ones(len(xx)), xx - xx.mean(), yy - yy.mean()], axis=1)
    solved = np.linalg.lstsq(terms, values, rcond=None)[0]
    return np.asarray(values - terms @ solved, np.float32), float(np.hypot(solved[1], solved[2]))


def _inside(rgb: Array, cover: Array, depth: Array, paint: Array) -> _Inside:
    """Measures over the pixels that lie deep enough to be free of the contour's stroke.

    rgb: [128, 128, 3]; cover, depth: [128, 128], depth in pixels from the nearest contour.
    """
    deepest = float(depth.max())
    inside, textured, painted = (depth >= min(d, 0.66 * deepest) for d in (4.4, STROKE_DEPTH, BLUR_DEPTH))
    yy, xx = np.nonzero(textured)
    rest = _less_plane(cover[textured], xx, yy)[0]
    radius = math.sqrt(max(1.0, float((depth > 0).sum()) / math.pi))
    return _Inside(
        count=int(inside.sum()),
        cover=float(cover[inside].mean()),
        deep=float(cover[depth >= min(7.0, 0.8 * deepest)].mean()),
        rough=float(_less_plane(cover[inside], *np.nonzero(inside)[::-1])[0].std()),
        diagonal=_along(rest, xx, yy, DIAGONALS) - _along(rest, xx, yy, AXES),
        slope=_less_plane(_lab(rgb[painted])[:, 0], *np.nonzero(painted)[::-1])[1] * radius,
        colour=np.median(rgb[inside], axis=0).astype(np.float32),
        paint=paint,
    )


def _round(mask: Mask, cover: Array) -> tuple[Array, Array]:
    """A round mask as the ellipse that has its moments.

    Returns each pixel's distance from the centroid in radii of the ellipse, [128, 128], and the cover
    [128, 128] by radius (RINGS rows to the radius) and direction (64 columns).
    """
    m = cv2.moments(mask, binaryImage=True)
    spread = (
        np.array([[m["mu20"], m["mu11"]], [m["mu11"], m["mu02"]]]) / m["m00"] / ZOOM**2 + np.eye(2) * 1e-3
    )
    centre = (np.array([m["m10"], m["m01"]]) / m["m00"] + 0.5) / ZOOM - 0.5
    axes = 2 * np.linalg.cholesky(spread)  # maps the unit circle to the ellipse
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    rho = np.linalg.norm(
        np.linalg.inv(axes) @ np.stack([xx - centre[0], yy - centre[1]]).reshape(2, -1), axis=0
    )
    angle = np.arange(64) * (2 * math.pi / 64)
    radius = (np.arange(RINGS) + 0.5)[:, None] / RINGS
    unit = np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(2, -1)
    x, y = (axes @ unit + centre[:, None]).reshape(2, RINGS, 64).astype(np.float32)
    polar = cv2.remap(cover, x, y, cv2.INTER_LINEAR)
    return rho.reshape(SIDE, SIDE).astype(np.float32), np.asarray(polar, np.float32)


def _style(inside: _Inside, ripple: float | None) -> str:
    """The drawing style that an object's inside speaks for. ripple: for a ring, else None."""
    if inside.cover > 0.6 and inside.rough < 0.13:
        return "gradient" if inside.slope > 7.5 else "flat"
    # The blur of both strokes fills a ring's narrow band, but evenly.
    if inside.deep < 0.11 if ripple is None else ripple < 0.06:
        return "outlined"
    return "hatched" if inside.diagonal > -0.05 else RARE_STYLE


def _colour(inside: _Inside, ground: Array, style: str) -> str:
    """The name of the palette's nearest colour. ground: the background there, RGB [3]."""
    names = tuple(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32)
    if style in STROKED:  # thin lines never reach the full colour: compare the way there from the background
        ways = palette - ground
        share = np.clip(ways @ inside.paint / (ways * ways).sum(axis=1), 0.3, 1.1)
        far = np.linalg.norm(share[:, None] * ways - inside.paint, axis=1)
    else:
        if style == "gradient":
            palette = (palette + (255 - palette) * LIGHT_END + palette * DARK_END) / 2
        far = np.linalg.norm(_lab(palette) - _lab(inside.colour.reshape(1, 3)), axis=1)
    return names[int(far.argmin())]


def _size(mask: Mask, shape: str, style: str) -> tuple[str, float]:
    """The size's name and the radius in pixels of 128, from the mask's area less the stroke outside it."""
    contour = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0], key=len)
    around = (
        cv2.arcLength(contour, True) / ZOOM * 0.95
    )  # steps along pixels are a little longer than the edge
    area = float(mask.sum()) / ZOOM**2 - around * _STROKE.get(style, 0.0) / 2
    radius = math.sqrt(max(area, 1.0) / outlines.area(shape))
    return min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius))), radius


def _depth(mask: Mask) -> Array:
    """The distance of each pixel from the mask's contour, in pixels of 128, 0 outside: [128, 128]."""
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT)  # the picture's border is a contour
    far = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1]
    return np.asarray(cv2.resize(far, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.float32) / np.float32(
        ZOOM
    )


def _seen(rgb: Array, ground: Array, contrast: Array, mask: Mask) -> tuple[Seen, int]:
    """One object and the number of pixels of its inside. rgb, ground: [128, 128, 3]; contrast: [128, 128]."""
    depth = _depth(mask)
    within = depth > 0.2
    top = within & (contrast >= np.percentile(contrast[within], 82))
    paint = (rgb[top] - ground[top]).mean(axis=0)
    cover = np.clip(((rgb - ground) @ paint) / max(float(paint @ paint), 1.0), -0.2, 1.3)
    moments = cv2.moments(mask, binaryImage=True)
    x, y = ((float(moments[key] / moments["m00"]) + 0.5) / ZOOM for key in ("m10", "m01"))
    found = templates.overlaps(mask)
    shape = max(found, key=lambda name: found[name])
    overlap = found[shape]
    ripple = None
    if shape == "circle":
        rho, polar = _round(mask, cover)
        if _is_ring(polar):
            shape = "ring"
            ripple = _ripple(polar)
            radius = math.sqrt(float(mask.sum()) / math.pi) / ZOOM
            depth = np.asarray(np.clip(np.minimum(depth, (rho - 0.5) * radius + 1.3), 0, None), np.float32)
    inside = _inside(rgb, cover, depth, paint)
    style = _style(inside, ripple)
    size, radius = _size(mask, shape, style)
    seen = Seen(
        shape=shape if overlap >= LEAST_OVERLAP else None,
        colour=_colour(inside, ground[within].mean(axis=0), style),
        size=size,
        x=x,
        y=y,
        radius=radius,
        style=style,
        overlap=overlap,
    )
    return seen, inside.count


def read(image: Picture) -> Reading:
    """Read a picture of the shapes world: uint8 [H, W, 3], RGB, of any size (128x128 is native).

    The scene's style is that of the object with the largest inside. Raises ValueError for other arrays.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"the judge reads uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if image.shape[:2] != (SIDE, SIDE):
        way = cv2.INTER_AREA if min(image.shape[:2]) > SIDE else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, (SIDE, SIDE), interpolation=way), np.uint8)
    rgb = image.astype(np.float32)
    ground = _ground(rgb)
    contrast = np.linalg.norm(_lab(rgb) - _lab(ground), axis=-1).astype(np.float32)
    found = [_seen(rgb, ground, contrast, mask) for mask in _masks(contrast)]
    return Reading(
        background=_nearest_background(np.median(ground.reshape(-1, 3), axis=0)),
        style=max(found, key=lambda pair: pair[1])[0].style if found else None,
        objects=tuple(seen for seen, _ in found),
    )
