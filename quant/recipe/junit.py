"""The report as JUnit XML: every step, gate and check a test case, which CI systems list."""

from __future__ import annotations

from xml.etree import ElementTree

from qserve.quant.recipe.report import RecipeReport


def render_junit(report: RecipeReport) -> str:
    """A test suite named after the recipe."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"qserve {report.recipe}",
        tests=str(1 + (report.evaluation is not None) + len(report.gates) + len(report.checks)),
        failures=str(len(report.failed)),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    _case(suite, "quantize", report.quantization.seconds)
    if report.evaluation is not None:
        _case(suite, "evaluate", report.evaluation.seconds)
    for kind, results in (("gate", report.gates), ("check", report.checks)):
        for result in results:
            case = _case(suite, f"{kind} {result.name}", 0.0)
            if not result.passed:
                ElementTree.SubElement(case, "failure", message=str(result))
    return _document(suite)


def render_junit_error(recipe: str, message: str) -> str:
    """A test suite whose only case is a run that did not come to an end."""
    suite = ElementTree.Element(
        "testsuite", name=f"qserve {recipe}", tests="1", failures="0", errors="1", time="0"
    )
    ElementTree.SubElement(_case(suite, "run", 0.0), "error", message=message)
    return _document(suite)


def _case(suite: ElementTree.Element, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname="qserve.recipe", name=name, time=f"{seconds:.3f}"
    )


def _document(suite: ElementTree.Element) -> str:
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"
