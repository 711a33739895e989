"""Texts for comparing tokenizers: our own words in many scripts, and seeded random Unicode."""
import random

WRITTEN = [
    "", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t\t x", "x  \n\n  y", "trailing   ", "\r\nCR LF\r\n", "a\u00a0b\u2003c\u3000d\u0085e\u2028f",
    "Hello, world! It's I'll we'Ve don'T 'tis ''s 'S", "don’t “quote” — dash… ¿qué?", "C++ #include <a.h> $x = {y: [1,2]}; // z\n\tif(a&&b){}",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² ٣٤٥ १२३ ⅻ 一二三 1º", "x1y22z333", "2024-01-31T12:00:00Z 0xDEADBEEF",
    "我想在apple工作1314151天～。「引用」", "日本語のテキストとカタカナ、ひらがな。ー", "한국어 문장입니다 ㄱㄴㄷ", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया क्षत्रिय",
    "Привет, мир! Ёлка", "Καλημέρα κόσμε", "שלום עולם", "สวัสดีชาวโลก", "កាន់តែពិសេស", "Ǆ ǅ ǆ ẞ ß ſ 'ſ K",
    "🦙🚀😶‍🌫️👩‍👩‍👧‍👦🇩🇪1️⃣", "e\u0301 é \u0301x a\u0308\u0323 \u200b\u200d\ufeff", "\x00\x01\x1b\x7f\x80\x9f", "\ue000\U000f0000\U0010ffff\u0378\u0e5c",
    "======= ------- ...... !!!???", "!a!b ?c #tag @me $USD 'quoted' (paren)word \"dq\"x .5 -x", "a_b-c/d\\e|f", "http://example.org/?q=1&r=%20#x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "        indented\n            more\n", "+<=>^~|` $+<=>^~|`", "\u0340'm \u20ac5 ≤∞ ™ ® ️", "“", "\u0300\u0301",
]

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " \t\n\r\v\f\u00a0\u2009\u3000", ".,;:!?'\"()[]{}<>@#$%^&*-_=+/\\|`~",
    "éüßñøÅçğıİŁſ", "жЩфЁїΩσςλ", "中文漢字一龥的", "ひらカターヿ゠", "가힣ㄱᄀ", "شلا٣", "क्षिา่", "\u0301\u0323\u20dd\u200d\ufe0f", "½²ⅻ①१", "€£+∑™©", "🦙😶🏽🇩",
    "\u0000\u001b\u200b\ue000\u0378",
]


def random_texts(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        some = rng.sample(ALPHABETS, rng.randint(1, 5))
        runs = []
        for _ in range(rng.randint(1, 12)):
            alphabet = rng.choice(some)
            runs.append("".join(rng.choice(alphabet) for _ in range(rng.choice([1, 1, 2, 3, 4, 7]))))
        yield "".join(runs)
