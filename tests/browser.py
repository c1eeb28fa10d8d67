"""A real browser without a window: pictures of a page as people see it."""

import os
import shutil
import signal
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
_TIMEOUT_SECONDS = 90


def find():
    """Give the browser's path, or skip the test."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    return found


def screenshot(page, directory, *, width=1280, height=4000, is_dark=False):
    """Open a page without a network and give its pixels: (height, width, 3 or 4), 0 to 1."""
    from matplotlib.image import imread

    target = directory / f"{page.stem}-{'dark' if is_dark else 'light'}-{width}.png"
    command = [
        find(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={directory / 'profile'}",
        f"--window-size={width},{height}",
        *(_DARK if is_dark else ()),
        f"--screenshot={target}",
        page.as_uri(),
    ]
    with (directory / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(_TIMEOUT_SECONDS)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    assert code == 0, (directory / "browser.log").read_text(errors="replace")[-4000:]
    return imread(target)[:, :, :3]


def share_of(pixels, colour, tolerance=0.04):
    """Tell which share of the pixels has a colour such as ``#0072b2``."""
    wanted = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    return float((abs(pixels - wanted).max(axis=2) < tolerance).mean())


def check_looks(page, directory):
    """Look at a page by day and by night: paper, ink and lines have their colours, and nothing sticks out."""
    from ssdtrain_plugin.report.drawing import THEMES

    for is_dark, paper in ((False, "#ffffff"), (True, "#15171a")):
        pixels = screenshot(page, directory, is_dark=is_dark)
        assert share_of(pixels, paper, 0.01) > 0.5, "the paper"
        for role in ("ink", "blue", "orange", "green", "purple", "grey"):
            assert share_of(pixels, THEMES[role][is_dark]) > 1e-5, role
        assert share_of(pixels[:, -8:], paper, 0.01) == 1.0, "something sticks out at the right"
    narrow = screenshot(page, directory, width=600)
    assert share_of(narrow[:, -8:], "#ffffff", 0.01) == 1.0, "something sticks out of a narrow window"
