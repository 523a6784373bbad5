"""The classes of ADE20K and COCO as facts: names, colours (PASCAL VOC's too), COCO's numbers.

Sources: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017, whose 150 classes and
colours the public tools share; Lin et al., arXiv:1405.0312, whose 80 classes have numbers up to 90.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Colour = tuple[int, int, int]

# One class a line, in the order of a model's logits: the colour in hexadecimal, the name.
_ADE20K: Final = """\
787878 wall
b47878 building
06e6e6 sky
503232 floor
04c803 tree
787850 ceiling
8c8c8c road
cc05ff bed
e6e6e6 windowpane
04fa07 grass
e005ff cabinet
ebff07 sidewalk
96053d person
787846 earth
08ff33 door
ff0652 table
8fff8c mountain
ccff04 plant
ff3307 curtain
cc4603 chair
0066c8 car
3de6fa water
ff0633 painting
0b66ff sofa
ff0747 shelf
ff09e0 house
0907e6 sea
dcdcdc mirror
ff095c rug
7009ff field
08ffd6 armchair
07ffe0 seat
ffb806 fence
0aff47 desk
ff290a rock
07ffff wardrobe
e0ff08 lamp
6608ff bathtub
ff3d06 railing
ffc207 cushion
ff7a08 base
00ff14 box
ff0829 column
ff0599 signboard
0633ff chest of drawers
eb0cff counter
a09614 sand
00a3ff sink
8c8c8c skyscraper
fa0a0f fireplace
14ff00 refrigerator
1fff00 grandstand
ff1f00 path
ffe000 stairs
99ff00 runway
0000ff case
ff4700 pool table
00ebff pillow
00adff screen door
1f00ff stairway
0bc8c8 river
ff5200 bridge
00fff5 bookcase
003dff blind
00ff70 coffee table
00ff85 toilet
ff0000 flower
ffa300 book
ff6600 hill
c2ff00 bench
008fff countertop
33ff00 stove
0052ff palm
00ff29 kitchen island
00ffad computer
0a00ff swivel chair
adff00 boat
00ff99 bar
ff5c00 arcade machine
ff00ff hovel
ff00f5 bus
ff0066 towel
ffad00 light
ff0014 truck
ffb8b8 tower
001fff chandelier
00ff3d awning
0047ff streetlight
ff00cc booth
00ffc2 television receiver
00ff52 airplane
000aff dirt track
0070ff apparel
3300ff pole
00c2ff land
007aff bannister
00ffa3 escalator
ff9900 ottoman
00ff0a bottle
ff7000 buffet
8fff00 poster
5200ff stage
a3ff00 van
ffeb00 ship
08b8aa fountain
8500ff conveyer belt
00ff5c canopy
b800ff washer
ff001f plaything
00b8ff swimming pool
00d6ff stool
ff0070 barrel
5cff00 basket
00e0ff waterfall
70e0ff tent
46b8a0 bag
a300ff minibike
9900ff cradle
47ff00 oven
ff00a3 ball
ffcc00 food
ff008f step
00ffeb tank
85ff00 trade name
ff00eb microwave
f500ff pot
ff007a animal
fff500 bicycle
0abed4 lake
d6ff00 dishwasher
00ccff screen
1400ff blanket
ffff00 sculpture
0099ff hood
0029ff sconce
00ffcc vase
2900ff traffic light
29ff00 tray
ad00ff ashcan
00f5ff fan
4700ff pier
7a00ff crt screen
00ffb8 plate
005cff monitor
b8ff00 bulletin board
0085ff shower
ffd600 radiator
19c2c2 glass
66ff00 clock
5c00ff flag
"""

# The number of the class in COCO's files, the name.
_COCO: Final = """\
1 person
2 bicycle
3 car
4 motorcycle
5 airplane
6 bus
7 train
8 truck
9 boat
10 traffic light
11 fire hydrant
13 stop sign
14 parking meter
15 bench
16 bird
17 cat
18 dog
19 horse
20 sheep
21 cow
22 elephant
23 bear
24 zebra
25 giraffe
27 backpack
28 umbrella
31 handbag
32 tie
33 suitcase
34 frisbee
35 skis
36 snowboard
37 sports ball
38 kite
39 baseball bat
40 baseball glove
41 skateboard
42 surfboard
43 tennis racket
44 bottle
46 wine glass
47 cup
48 fork
49 knife
50 spoon
51 bowl
52 banana
53 apple
54 sandwich
55 orange
56 broccoli
57 carrot
58 hot dog
59 pizza
60 donut
61 cake
62 chair
63 couch
64 potted plant
65 bed
67 dining table
70 toilet
72 tv
73 laptop
74 mouse
75 remote
76 keyboard
77 cell phone
78 microwave
79 oven
80 toaster
81 sink
82 refrigerator
84 book
85 clock
86 vase
87 scissors
88 teddy bear
89 hair drier
90 toothbrush
"""


def _rows(text: str) -> list[tuple[str, str]]:
    return [(first, name) for first, _, name in (line.partition(" ") for line in text.splitlines())]


def _colour(digits: str) -> Colour:
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue


ADE20K: Final = tuple(name for _, name in _rows(_ADE20K))
ADE20K_COLOURS: Final = tuple(_colour(digits) for digits, _ in _rows(_ADE20K))
COCO: Final = tuple(name for _, name in _rows(_COCO))
COCO_CATEGORIES: Final = tuple(int(number) for number, _ in _rows(_COCO))
_NAMES: Final = {"ade20k": ADE20K, "coco": COCO}


def names_of(model: str, num_classes: int) -> tuple[str, ...] | None:
    """The names of a model's classes by the data set that its own name ends with.

    None where that is neither of the two, or the model has another number of classes, as one has
    that was made for other data.
    """
    names = _NAMES.get(model.rpartition("_")[2])
    return names if names is not None and len(names) == num_classes else None


def palette_of(labels: Sequence[str] | None, num_classes: int) -> tuple[Colour, ...]:
    """The colours that a segmenter's classes are painted in.

    Args:
        labels: names of the classes; by ADE20K's names they have ADE20K's colours, else VOC's.
        num_classes: how many colours there are to be, where the names do not say.
    """
    if labels is not None and tuple(labels) == ADE20K:
        return ADE20K_COLOURS
    return voc_colours(num_classes)


def voc_colours(count: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colours, black first: the bits of the number spread out over the channels.

    No two of the first 256 are alike.
    """

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(n, 0), channel(n, 1), channel(n, 2)) for n in range(count))
