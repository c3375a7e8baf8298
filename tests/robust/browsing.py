"""A browser for the tests of reports: how it is started, how a page is opened, and what is read from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

# The contrast of every text with what lies behind it, colours as the browser paints them (WCAG 2.2, 1.4.3).
CONTRAST = """
() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const paint = colours => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => rgb.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    if (!text || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const own = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(paint(behind)), light(paint([...behind, own]))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.slice(0, 40)]);
  }
  return found;
}
"""


@contextmanager
def launched(chromium: str) -> Iterator[Any]:
    """A browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield found
        found.close()


@contextmanager
def opened(browser: Any, size: str, report: Path) -> Iterator[Any]:
    """A report at one of `SIZES`, with what the browser complained about and asked for."""
    width, height = SIZES[size]
    found = browser.new_page(viewport={"width": width, "height": height})
    found.complaints, found.requests, found.address = [], [], report.as_uri()
    found.on("console", lambda message: found.complaints.append(message.text))
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.on("request", lambda sent: found.requests.append(sent.url))
    found.goto(found.address)
    yield found
    found.close()


def shown(page: Any, selector: str) -> str:
    """The text a reader sees, spaces joined."""
    return " ".join(page.inner_text(selector).split())
