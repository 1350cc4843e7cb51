"""Take the pictures of the page in docs/images: `python -m tests.helpers.pictures`."""

import tempfile
from pathlib import Path

from tests.helpers.browser import Browser, browser
from tests.helpers.page import serving, write_microphone

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"


def take(page: Browser, url: str, path: Path) -> None:
    """Take a picture of the page while it listens and speaks."""
    page.get(url)
    page.click("mic")
    page.wait(lambda: len(page.words()) >= 2)
    page.click("say")
    page.wait(lambda: page.run("return document.querySelectorAll('#spoken .said').length") >= 2)
    page.wait(lambda: page.text("partial"))
    page.run("scrollTo(0, 0)")
    page.driver.save_screenshot(str(path))


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serving() as (url, _):
        microphone = write_microphone(Path(folder) / "digits.wav")
        for scheme, device in (("light", "desktop"), ("dark", "desktop"), ("light", "phone"), ("dark", "phone")):
            with browser(Path(folder), microphone) as page:
                page.prefer(color_scheme=scheme)
                if device == "phone":
                    page.resize(375, 812, mobile=True, scale=2)
                else:
                    page.resize(1280, 800)
                take(page, url, IMAGES / f"page-{device}-{scheme}.png")


if __name__ == "__main__":
    main()
