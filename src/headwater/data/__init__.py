"""data, stage 4: which training data formed a mechanism.

`Corpus` is what a model saw, in the order of its training; `count` says how often terms, and pairs of terms,
stood in it; `linear_relation` measures how well one affine map stands for what a model does to decode a relation;
`relation_strengths` does so over checkpoints, `frequency_link` holds that against counts, `compare_worlds` against the
same facts under other frequencies;
`attribute` scores training sequences for a behavior, and `remove_and_retrain` is the test of that.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_PLACES = {
    "Corpus": "headwater.data.corpus",
    "Counts": "headwater.data.counts",
    "count": "headwater.data.counts",
    "read_pairs": "headwater.data.pairs",
    "Relation": "headwater.data.relations",
    "Lre": "headwater.data.lre",
    "LreResult": "headwater.data.lre",
    "linear_relation": "headwater.data.lre",
    "relation_strengths": "headwater.data.link_strengths",
    "frequency_link": "headwater.data.link",
    "compare_worlds": "headwater.data.link_worlds",
    "NgramIndex": "headwater.data.ngrams",
    "memorized": "headwater.data.memorization",
    "nearest": "headwater.data.neighbours",
    "AttributionToData": "headwater.data.attribution.result",
    "attribute": "headwater.data.attribution.attributing",
    "DataRemoval": "headwater.data.attribution.removing",
    "remove_and_retrain": "headwater.data.attribution.removing",
}

__all__ = [
    "AttributionToData",
    "Corpus",
    "Counts",
    "DataRemoval",
    "Lre",
    "LreResult",
    "NgramIndex",
    "Relation",
    "attribute",
    "compare_worlds",
    "count",
    "frequency_link",
    "linear_relation",
    "memorized",
    "nearest",
    "read_pairs",
    "relation_strengths",
    "remove_and_retrain",
]


__getattr__, __dir__ = lazy(__name__, _PLACES, __all__)


if TYPE_CHECKING:
    from headwater.data.attribution.attributing import attribute
    from headwater.data.attribution.removing import DataRemoval, remove_and_retrain
    from headwater.data.attribution.result import AttributionToData
    from headwater.data.corpus import Corpus
    from headwater.data.counts import Counts, count
    from headwater.data.link import frequency_link
    from headwater.data.link_strengths import relation_strengths
    from headwater.data.link_worlds import compare_worlds
    from headwater.data.lre import Lre, LreResult, linear_relation
    from headwater.data.memorization import memorized
    from headwater.data.neighbours import nearest
    from headwater.data.ngrams import NgramIndex
    from headwater.data.pairs import read_pairs
    from headwater.data.relations import Relation
