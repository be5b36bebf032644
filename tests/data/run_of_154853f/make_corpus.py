"""Write the corpus of the kept run: short texts of seeded sentences, the same bytes wherever this
is run."""

import random
from pathlib import Path

PARTS = (
    (
        "the rank,a node,the supervisor,an agent,the optimizer,one attempt,the journal,"
        "a checkpoint,the loss,the cursor"
    ),
    "waits for,restores,writes,follows,leaves,verifies,counts,replaces,reads,forgets",
    (
        "the batch,its parameters,an older manifest,every step,the moments,a shard,the world,"
        "some tokens,no order,the lease"
    ),
    (
        "before the boundary,after a failure,on the shared disk,in memory,without a word,"
        "at step {n},within {n} seconds,again"
    ),
)
NAMES = ("one", "two", "three", "four", "five", "six")


def draw_sentence(draw: random.Random) -> str:
    words = [draw.choice(part.split(",")) for part in PARTS]
    text = " ".join(words).format(n=draw.randrange(1000))
    return text[0].upper() + text[1:] + "."


def main() -> None:
    draw = random.Random(154853)
    folder = Path(__file__).parent / "corpus"
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        paragraphs = (" ".join(draw_sentence(draw) for _ in range(5)) for _ in range(8))
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs) + "\n")


if __name__ == "__main__":
    main()
