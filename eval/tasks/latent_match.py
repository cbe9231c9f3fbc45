"""Needle and question share no word that matters; a fact about the world joins them.

After NoLiMa (Modarressi et al. 2025, arXiv 2502.05167), whose needles may not be used commercially; these are
our own. Needle: "Rosa lives next to the Colosseum."; question: who has been to Italy. Other persons live in
other countries, so that guessing among the names gets 1 of `PERSONS`.
"""

from eval.haystack import sentences
from eval.tasks.base import PromptTask, Sample, Writer, any_contained, largest

WHERE = {
    "the Colosseum": "Italy", "the Eiffel Tower": "France", "the Brandenburg Gate": "Germany",
    "the Acropolis": "Greece", "the Alhambra": "Spain", "Big Ben": "England", "the Great Sphinx": "Egypt",
    "the Taj Mahal": "India", "the Forbidden City": "China", "Mount Fuji": "Japan", "Machu Picchu": "Peru",
    "the Statue of Liberty": "America", "the Sydney Opera House": "Australia", "the Kremlin": "Russia",
    "Table Mountain": "South Africa", "the Hagia Sophia": "Turkey", "Angkor Wat": "Cambodia",
    "the Little Mermaid": "Denmark", "the Atomium": "Belgium", "Petra": "Jordan",
}  # fmt: skip
NAMES = ("Rosa", "Hugo", "Irene", "Felix", "Nora", "Oscar", "Clara", "Victor", "Stella", "Martin")
PERSONS = 4


def write(writer: Writer) -> Sample:
    """Persons at places anywhere in prose; asked for is the one who has been to a place's country."""
    rng = writer.rng
    persons, places = rng.sample(NAMES, PERSONS), rng.sample(sorted(WHERE), PERSONS)
    needles = [f"{who} lives next to {where}." for who, where in zip(persons, places, strict=True)]
    asked = rng.randrange(PERSONS)
    depths = [rng.random() for _ in needles]
    question = (
        f"\nQuestion: Which of {', '.join(sorted(persons))} has been to {WHERE[places[asked]]}?"
        " Answer with the name alone.\nAnswer:"
    )

    def text(size: int) -> str:
        lines = sentences(writer.haystack.text(size))
        for needle, depth in zip(needles, depths, strict=True):
            lines.insert(round(depth * len(lines)), needle)
        return f"Read the following text. A question about it follows.\n{' '.join(lines)}\n{question}"

    return Sample(text(largest(text, writer.count, writer.budget, 20)), (persons[asked],))


TASKS = [
    PromptTask(
        "latent_match", "after NoLiMa, arXiv 2502.05167", "who lives by a sight of that country", write,
        max_new_tokens=12, guess=1 / PERSONS, score=any_contained, stop=("\n",),
    )
]  # fmt: skip
