"""Lists of words without content, as keys: function words, and words about a file or a page instead of the picture."""

from __future__ import annotations

from capsfusion_ray.core.word_keys import key_of

# Words that say nothing about the picture.
_FUNCTION_WORDS = """
a an and are as at be been being but by can for from had has have he her his how i if in into is it its just me my
no not of off on one or our out over she so some than that the their them then there these they this to up was we
were what when which while who will with without you your s t de la le el di del der die das und et y con en for
image photo picture photograph showing shown show two three
"""

# Words of alt texts that describe the file or the page instead of the picture. A caption is boilerplate only if it has no other
# words: 'Giraffe-Drinking-Water-Images-540x337' has the giraffe.
_FILE_WORDS = """
image img images picture pic pics photo photos foto bild imagen photograph photography thumbnail thumb thumbs icon
logo banner avatar screenshot screen shot capture dsc dscn dscf dscn pict mvc file files upload uploads download
media attachment untitled unnamed default placeholder blank none null undefined nan na alt text title caption
description here click tap to enlarge zoom view full size large medium small larger original scaled crop cropped
resized copy final new edited edit version v px jpg jpeg png gif webp svg bmp tif tiff html htm php asp aspx www
http https com wp content preview hero header footer slide slider gallery main product no available loading loader
lazy image0 the a an of this is for more info and or in it s by x w h unsplash pexels pixabay whatsapp at am pm
"""

STOP_KEYS = frozenset(map(key_of, _FUNCTION_WORDS.split()))
BOILERPLATE_KEYS = frozenset(map(key_of, _FILE_WORDS.split()))
