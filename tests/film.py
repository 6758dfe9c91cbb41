"""Films the explorer in a headless Chromium: the patches that matter vanish, the prediction flips.

    python tests/film.py docs/explorer.html docs/explorer.webp

Needs playwright and a Chromium.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-dev-shm-usage"]  # for root, and for a small /dev/shm
MOST = 20  # steps
AT_ONCE = 2  # patches
AFTER = 3  # steps that are shown after the prediction has flipped
WIDTH, HEIGHT = 920, 500


def film(page: Path) -> Iterator[Image.Image]:
    """The picture of the page after each step."""
    with sync_playwright() as started:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            view = browser.new_page(viewport={"width": WIDTH, "height": 2 * HEIGHT})
            view.goto(f"{page.resolve().as_uri()}#view=relevance")
            first, after = None, 0
            for _ in range(MOST):
                view.wait_for_function("() => isCurrent()")
                top = view.locator("#stage").bounding_box()["y"] - 8
                clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT}
                yield Image.open(io.BytesIO(view.screenshot(clip=clip))).convert("RGB")
                predicted = view.evaluate("() => result.c")
                first = predicted if first is None else first
                after += predicted != first
                if after > AFTER:
                    return
                view.evaluate(f"() => removeBy(1, {AT_ONCE})")
        finally:
            browser.close()


def main(page: str, out: str) -> None:
    first, *others = film(Path(page))
    durations = [1500, *[400] * (len(others) - 1), 2500]  # milliseconds
    first.save(out, save_all=True, append_images=others, duration=durations, loop=0, quality=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
