"""The simulator's text: a deterministic row of words, each exactly one o200k token with its leading space.

Because a token never reaches over the space before a word, a text of n words has exactly n tokens wherever it is cut;
`tests/simulator` counts the words with the real encoding.
"""

import random
from typing import Final

#: 320 common English words; " " + word is one token of o200k_base.
PLAIN: Final = tuple(
    """
river stone water light house garden winter summer spring autumn morning evening night day week month year
time hour minute second city town village street road bridge mountain valley forest field ocean island coast
harbor ship boat train car wheel engine machine tool hammer knife paper book letter word story song music
dance color red green blue yellow black white silver gold iron copper glass wood fire smoke ash rain snow
wind storm cloud sky sun moon star planet earth sand clay salt sugar bread butter cheese apple orange lemon
grape cherry berry tree leaf root seed flower grass wheat corn rice bean soup meal table chair door window
wall roof floor room kitchen bed lamp clock mirror picture frame box bag basket bottle cup plate spoon fork
coat shirt shoe hat ring chain rope thread cloth silk wool cotton leather bird fish horse dog cat cow sheep
goat wolf bear fox lion tiger mouse snake frog bee ant spider king queen prince soldier farmer doctor
teacher student child mother father brother sister friend guest neighbor stranger people crowd army market
shop bank school church temple castle tower gate path trail map journey travel visit return walk run jump
climb swim fly fall rise grow build make carry hold lift push pull open close begin end learn teach read
write speak listen hear see watch look find lose keep give take bring send buy sell pay trade count measure
weigh cut break mend clean wash cook eat drink sleep dream wake think know believe hope wish love trust help
serve lead follow wait stay leave arrive enter pass cross turn move rest quiet loud soft hard warm cold hot
dry wet deep shallow wide narrow long short tall small large great little old young new early late fast slow
strong weak rich poor kind brave calm wise simple plain bright dark clear sharp smooth rough round flat
empty full heavy
""".split()  # noqa: SIM905 - rows of words read better than rows of quotes
)

#: The same property in other scripts (`[[sim mixed=1]]`): two, three and four bytes of UTF-8 a character, so that a
#: reader that cuts inside one is found out.
MIXED: Final = tuple(
    """
café über año niño garçon привет мир вода дом город день ночь жизнь время 世界 日本 中国 水 山 人 東京 한국 사람
שלום العربية και 😀 € ñ ç
""".split()  # noqa: SIM905 - as above
)


def text(seed: int, count: int, *, mixed: bool = False) -> list[str]:
    """`count` tokens, each " word", the same for the same arguments (I12)."""
    dice = random.Random(seed)  # noqa: S311 - a repeatable text is the point
    words = MIXED + PLAIN[:20] if mixed else PLAIN
    return [" " + word for word in dice.choices(words, k=count)]
