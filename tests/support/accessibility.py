"""Faults of a page that keep people from using it, as axe-core finds them."""

from __future__ import annotations

from typing import Any

import npm
from helpers import ROOT

_AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
_RUN = """
async (selector) => {
  const elements = [...document.querySelectorAll(selector)];
  if (!elements.length) throw new Error(`nothing is ${selector}`);
  const { violations, passes } = await window.axe.run({ include: elements }, { resultTypes: ["violations"] });
  const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
  const faults = serious.flatMap(({ id, nodes }) =>
    nodes.map(({ html, failureSummary }) => `${id}: ${html.slice(0, 120)} ${failureSummary.replace(/\\s+/g, " ")}`));
  return { faults, passed: passes.length };
}
"""


def faults(page: Any, selector: str = ".dreambooth") -> list[str]:
    """Serious and critical faults within the elements of a selector: the rule, the element, and what is wrong.

    npm installs axe-core the first time.
    """
    if not page.evaluate("Boolean(window.axe)"):
        npm.install()
        page.evaluate(_AXE.read_text(encoding="utf-8"))
    result = page.evaluate(_RUN, selector)
    assert result["passed"] > 0
    return list(result["faults"])
