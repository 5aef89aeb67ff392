"""A file of each task of GLUE in its official layout, and the same rows as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# One file of each task in its official layout: name, text, and what must be read from it.
LAYOUTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "rte": (
        'index\tsentence1\tsentence2\tlabel\n0\tA "big cat\tA cat.\tentailment\n1\tNo.\tYes.\tnot_entailment\n',
        [
            {"text": 'A "big cat', "text_pair": "A cat.", "label": 0},
            {"text": "No.", "text_pair": "Yes.", "label": 1},
        ],
    ),
    "cola": (
        "gj04\t1\t\tHe won't go.\nbc01\t0\t*\tHe go\twon't.\n",
        [{"text": "He won't go.", "label": 1}, {"text": "He go", "label": 0}],
    ),
    "sst2": (
        "sentence\tlabel\nno wit , only gags \t0\r\nfun\t1\r\n",
        [{"text": "no wit , only gags ", "label": 0}, {"text": "fun", "label": 1}],
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " yes\tYes\n0\t7\t9\tA\tB\n',
        [{"text": 'He said " yes', "text_pair": "Yes", "label": 1}, {"text": "A", "text_pair": "B", "label": 0}],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012\t1\tnone\tnone\tA\tB\t5.000\n1\tm\tf\t2012\t2\tnone\tnone\tC\tD\t2.5\n",
        [{"text": "A", "text_pair": "B", "label": 5.0}, {"text": "C", "text_pair": "D", "label": 2.5}],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n4\t5\tcut\n6\t7\t8\tA?\tB?\t1\n",
        [{"text": "Why?", "text_pair": "How?", "label": 0}, {"text": "A?", "text_pair": "B?", "label": 1}],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1n\tx\tA\tB\tneutral\tneutral\n1\t1\t1n\tx\tC\tD\tneutral\tcontradiction\n",
        [{"text": "A", "text_pair": "B", "label": 1}, {"text": "C", "text_pair": "D", "label": 2}],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tA?\tB\tnot_entailment\n",
        [{"text": "Who?", "text_pair": "He.", "label": 0}, {"text": "A?", "text_pair": "B", "label": 1}],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n1\tC\tD\t0\n",
        [{"text": "A", "text_pair": "B", "label": 1}, {"text": "C", "text_pair": "D", "label": 0}],
    ),
}


def write(folder: Path, task: str, content: str, names: tuple[str, ...] = ("train", "dev")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for kind in ("_matched", "_mismatched") if task == "mnli" and name != "train" else ("",):
            (folder / f"{name}{kind}.tsv").write_bytes(content.encode())
    return folder


_PAIRS = {"sentence1": ["A", "C"], "sentence2": ["B", "D"]}
# Columns of nyu-mll/glue. The rows are two, A and B, C and D; the second one's label has index 1, or is 2.5.
HUB: dict[str, dict[str, list[Any]]] = {
    "cola": {"sentence": ["A", "C"], "label": [0, 1]},
    "sst2": {"sentence": ["A", "C"], "label": [0, 1]},
    "mrpc": _PAIRS | {"label": [0, 1]},
    "stsb": _PAIRS | {"label": [5.0, 2.5]},
    "qqp": {"question1": ["A", "C"], "question2": ["B", "D"], "label": [0, 1]},
    "mnli": {"premise": ["A", "C"], "hypothesis": ["B", "D"], "label": [0, 1]},
    "qnli": {"question": ["A", "C"], "sentence": ["B", "D"], "label": [0, 1]},
    "rte": _PAIRS | {"label": [0, 1]},
    "wnli": _PAIRS | {"label": [0, 1]},
}
