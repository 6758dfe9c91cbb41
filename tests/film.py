"""Films the explorer in a headless Chromium: the patches that matter vanish, the prediction flips.

    python tests/film.py docs/explorer.html docs/explorer.webp

Shows the first picture of the page whose prediction flips. Needs playwright and a Chromium.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-dev-shm-usage"]  # for root, and for a small /dev/shm
MOST, AT_ONCE, AFTER = 16, 2, 2  # steps, patches per step, steps that a flip must last
WIDTH, HEIGHT = 920, 462
PREDICTED = "() => result.shares.at(-1).indexOf(Math.max(...result.shares.at(-1)))"


def steps(page, picture: int) -> tuple[list[Image.Image], bool]:
    """Frames in which more and more of a picture is removed; whether its prediction flips."""
    # Skip the curves, which take just as long and are outside the frame.
    page.evaluate(f"() => {{ pictures[{picture}].curves = {{}}; choose({picture}); }}")
    frames, classes, flips = [], [], False
    while len(frames) < MOST and not flips:
        page.wait_for_function("() => isCurrent()")
        classes.append(page.evaluate(PREDICTED))
        top = page.locator("#stage").bounding_box()["y"] - 8
        clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT}
        frames.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
        page.evaluate(f"() => {{ state.target = {classes[0]}; removeBy(1, {AT_ONCE}); }}")
        flips = classes[0] not in classes[-AFTER:]
    return frames, flips


def main(page_file: str, out: str) -> None:
    with sync_playwright() as started:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 2 * HEIGHT})
        page.set_default_timeout(120_000)
        page.goto(f"{Path(page_file).resolve().as_uri()}#view=relevance")
        page.wait_for_function("() => result")
        filmed = (steps(page, picture) for picture in range(page.evaluate("() => pictures.length")))
        frames = next((frames for frames, flips in filmed if flips), None)
        browser.close()
    if frames is None:
        sys.exit(f"no prediction flips within {MOST} steps")
    first, *others = frames
    durations = [1500, *[400] * (len(others) - 1), 2500]  # milliseconds
    first.save(out, save_all=True, append_images=others, duration=durations, loop=0, quality=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("pass the page and the file to write, as in results/README.md")
    main(*sys.argv[1:])
