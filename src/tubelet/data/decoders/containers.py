"""Files whose frames other libraries than PyAV get wrong."""

from tubelet.data.decoders.files import PathOrFile, opened
from tubelet.data.decoders.mp4 import FIRST_BOXES, read_movie

MATROSKA = b"\x1a\x45\xdf\xa3"


def only_pyav_is_right(source: PathOrFile, decoder: str) -> bool:
    """Whether decord or torchcodec may give other frames of a file than FFmpeg presents, or turn them wrongly.

    Both do in transport streams, AVI and other containers without an index of time stamps, and both ignore mirroring.
    decord also counts frames that an edit list hides.
    """
    with opened(source) as file:
        start = file.read(8)
        if start[:4] == MATROSKA:
            return False
        if start[4:] not in FIRST_BOXES:
            return True
        movie = read_movie(file)
    if movie is None:
        return decoder == "decord"
    return any(track.mirrored or decoder == "decord" and track.trimmed for track in movie.tracks)
