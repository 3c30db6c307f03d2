"""The packages a corpus is cut from: which of their images, into how many crops, under which licence.

A licence is what the package's own copyright or credits file says of the images kept.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A Debian package and which of its images to cut into how many crops."""

    package: str
    kind: str
    license: str
    crops: int
    keep: str = ""  # a regular expression that paths must match
    drop: str = "$^"  # and one that they must not
    every: int = 1
    least: int = 96  # pixels of the short side


EMOJI = {"google": "Apache-2.0", "twitter": "CC-BY-4.0"}
PHOTO, MIXED, TEXTURE, RENDER, DRAWING = "photo", "photo and drawing", "texture photo", "render", "drawing"
MAPS = (
    r"_(norm|bump|gloss|glow|nm|sm|gm|shirt|pants|reflect|luma|blend|spec|nh)\b"
    r"|decal|lightmap|font|/effects?/|flare|fog"
)
DEBIAN = [
    Source(
        package="lomiri-wallpapers-16.04",
        kind=PHOTO,
        license="CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0, CC0-1.0",
        crops=130,
    ),
    Source(
        package="lomiri-wallpapers-20.04",
        kind=PHOTO,
        license="CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0, CC0-1.0",
        crops=60,
    ),
    Source(package="enlightenment-data", kind=PHOTO, license="BSD-2-Clause", crops=130, least=900),
    Source(
        package="plasma-workspace-wallpapers",
        kind=PHOTO,
        license="GPL-2+; each wallpaper: LGPL-3 or CC-BY-SA-4.0",
        crops=60,
        drop="screenshot|images_dark|1080x1920|720x1440|1622x2880",
    ),
    Source(
        package="mate-backgrounds",
        kind=PHOTO,
        license="GPL-2+, CC-BY-SA-4.0",
        crops=80,
        drop=r"_\d+x\d+|Stripes|logo",
    ),
    Source(package="gnome-backgrounds", kind=DRAWING, license="CC-BY-SA-3.0, CC-BY-SA-2.0", crops=16),
    Source(package="ukui-wallpapers", kind=DRAWING, license="CC-BY-SA-3.0", crops=30),
    Source(
        package="endless-sky-high-dpi",
        kind=PHOTO,
        license="public domain, CC-BY-SA-3.0, CC-BY-SA-4.0, CC-BY-4.0",
        crops=18,
        keep="/(land|scene)/",
    ),
    Source(
        package="gcompris-qt-data",
        kind=MIXED,
        license="CC-BY-SA, CC-BY, CC0, public domain, GPL-3+",
        crops=10,
        least=200,
    ),
    Source(package="tuxpaint-data", kind=PHOTO, license="GPL-2+", crops=40, keep="templates/.*jpg"),
    Source(
        package="kphotoalbum",
        kind=PHOTO,
        license="GPL-2+",
        crops=25,
        keep="demo/.*jpg",
        drop="logo|CategoryImages",
    ),
    Source(package="palapeli-data", kind=PHOTO, license="GPL-2+", crops=25, keep="jpg", least=400),
    Source(package="psychtoolbox-3-common", kind=PHOTO, license="Expat", crops=20, keep="jpg", least=300),
    Source(
        package="python3-skimage",
        kind=PHOTO,
        license="BSD-3-Clause, CC0-1.0",
        crops=25,
        least=200,
        drop="test|logo",
    ),
    Source(package="scratch", kind=PHOTO, license="CC-BY-SA-3.0", crops=14, keep="Backgrounds/.*jpg"),
    Source(
        package="torcs-data",
        kind=TEXTURE,
        license="GPL-2+, Free-Art-License",
        crops=3,
        keep="tracks|textures|objects",
        drop=MAPS + "|shadow|raceline",
    ),
    Source(package="nexuiz-textures", kind=TEXTURE, license="GPL-2+", crops=2, drop=MAPS, least=128),
    Source(
        package="ufoai-textures",
        kind=TEXTURE,
        license="GPL-2+, CC-BY-SA-3.0, CC-BY-3.0",
        crops=2,
        drop=MAPS,
        least=128,
    ),
    Source(package="openarena-081-textures", kind=TEXTURE, license="GPL-2+", crops=2, drop=MAPS + "|sfx", least=128),
    Source(package="sweethome3d-furniture", kind=RENDER, license="CC-BY-3.0, CC0-1.0", crops=2),
    Source(package="povray-examples", kind=RENDER, license="CC-BY-SA-3.0, CC-BY-3.0", crops=2, keep="jpg"),
    Source(package="freedroidrpg-data", kind=RENDER, license="GPL-2+", crops=1, keep="portrait", every=6),
    Source(package="tuxpaint-stamps-default", kind=MIXED, license="GPL-2", crops=2, least=72),
    Source(package="pysiogame", kind=DRAWING, license="CC-BY-SA (Art4Apps)", crops=1, keep="art4apps"),
    Source(package="openclipart-png", kind=DRAWING, license="public domain", crops=1, every=2),
]
