"""Opens a page in headless Chromium and plays what is on it. By hand: `python tests/_browser.py PAGE SCREENSHOT`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')

# Every player must sound: its time goes on, and it has a name. Pictures must have a size and a text.
_LOOK = """async () => {
  const played = [];
  for (const player of document.querySelectorAll('audio')) {
    player.muted = true;
    const goesOn = new Promise((resolve, reject) => {
      player.addEventListener('timeupdate', () => player.currentTime > 0 && resolve());
      setTimeout(() => reject(new Error(`${player.ariaLabel} does not go on`)), 60000);
    });
    await player.play();
    await goesOn;
    const cursor = player.closest('.system').querySelector('.cursor');
    played.push({name: player.ariaLabel, seconds: player.duration, cursor: cursor.style.left,
                 others: [...document.querySelectorAll('audio')].filter((other) => !other.paused).length});
    player.pause();
  }
  return {
    played,
    images: [...document.images].map((image) => [image.alt, image.naturalWidth, image.naturalHeight]),
    charts: [...document.querySelectorAll('svg')].map((svg) => [svg.ariaLabel, svg.childElementCount]),
    unnamed: [...document.querySelectorAll('audio, button, [tabindex], svg')].filter((one) => !one.ariaLabel).length,
    headings: [...document.querySelectorAll('h2')].map((heading) => heading.textContent),
  };
}"""
_BACK = "() => getComputedStyle(document.body).backgroundColor"
_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def chromium() -> str | None:
  """The browser on this machine."""
  return next(filter(None, map(shutil.which, NAMES)), None)


def look(page: Path, screenshot: Path) -> dict[str, Any]:
  """What `_LOOK` finds, what the console said, what was asked of the network, and how it looks dark and on a phone."""
  with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=chromium(), args=[
        '--no-sandbox', '--autoplay-policy=no-user-gesture-required', '--disable-dev-shm-usage'])
    tab = browser.new_page(viewport={'width': 1200, 'height': 900}, color_scheme='light')
    said, asked = [], []
    tab.on('console', lambda message: said.append(message.text))
    tab.on('pageerror', lambda error: said.append(str(error)))
    tab.on('request', lambda request: asked.append(request.url.partition(':')[0]))
    tab.goto(page.absolute().as_uri())
    found = tab.evaluate(_LOOK)
    light = tab.evaluate(_BACK)
    tab.screenshot(path=screenshot, full_page=True)
    tab.emulate_media(color_scheme='dark')
    dark = tab.evaluate(_BACK)
    tab.set_viewport_size({'width': 390, 'height': 800})
    too_wide = tab.evaluate(_WIDE)
    tab.screenshot(path=screenshot.with_stem(f'{screenshot.stem}_phone'))
    browser.close()
  return {**found, 'said': said, 'asked': sorted(set(asked)), 'light': light, 'dark': dark, 'too_wide': too_wide}


if __name__ == '__main__':
  print(json.dumps(look(Path(sys.argv[1]), Path(sys.argv[2])), indent=2))
