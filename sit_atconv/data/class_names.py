"""Names of classes and files, as they are compared."""

import unicodedata


def normal(name: str) -> str:
    """Returns the form in which names are compared: Unicode's NFC, without outer blanks.

    (macOS writes "é" as two characters, and most keyboards as one; both look the same.)
    """
    return unicodedata.normalize("NFC", name).strip()
