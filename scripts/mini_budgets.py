"""The last step of mini_budgets.sh: answers of several checkpoints to the same questions, in one table.

    python scripts/mini_budgets.py WORLD DIR NAME [NAME ...]

reads DIR/bed-NAME/*.jsonl (`llava mini evaluate`) and writes table.md, table.json and accuracy.png into DIR.
A later NAME is tested against each earlier one, question by question, at the same number of tokens.
"""

import argparse
from pathlib import Path

from llava.eval.reading import read_rows
from llava.mini.comparison import name_of, write_report
from llava.mini.evaluate import read_scenes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    rows: dict[str, dict[str, dict]] = {}
    for name in args.names:
        for file in sorted((args.folder / f"bed-{name}").glob("*.jsonl")):
            for _, row in read_rows(file, dict):
                rows.setdefault(f"{name}(tokens={row['tokens']})", {})[row["question_id"]] = row
    rows = dict(sorted(rows.items(), key=lambda item: next(iter(item[1].values()))["tokens"]))
    scenes = read_scenes(args.world)
    answered = [image for image in scenes if all(image in there for there in rows.values())]
    questions = [question for image in answered for question in scenes[image]]
    rank = args.names.index
    write_report(args.folder, questions, rows, lambda one, other: rank(name_of(one)) > rank(name_of(other)))
    print((args.folder / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
