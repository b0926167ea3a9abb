"""What mkdocs is told about files outside of docs/: charts and the kernels' README are part of the site.

Links that a reader on the repository's page needs (`../bench/results/plots/x.png`) are turned into the site's own.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("pallas_kernels/README.md",)
CHARTS = "bench/results/plots"


def on_files(files: Any, config: Any) -> Any:
    """Add the charts and the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    for path in [*(ROOT / CHARTS).glob("*.png"), *(ROOT / page for page in PAGES)]:
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the rest: kept where the target is part of the site, else a name without a link."""
    inside = page.file.src_uri in PAGES

    def link(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if inside and target.startswith("../docs/"):
            return f"[{text}](../{target.removeprefix('../docs/')})"
        if not inside and target.startswith("../"):
            target = target.removeprefix("../")
            kept = target.startswith(CHARTS) or target in PAGES
            return f"[{text}]({target})" if kept else f"{text} (`{target}`)"
        return match[0]

    return re.sub(r"\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)]*)\)", link, markdown)
