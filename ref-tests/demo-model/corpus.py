"""Text for the demo model: made-up stories whose facts can be asked for again, and Shakespeare.

Every story plants facts early (who has what, where it was put) and asks for them later, so that a
model trained on it measures what a KV-cache policy forgot: the answer is right only while the
tokens that carry the fact can still be attended to.  Deterministic for a given seed.
"""
import random

USER, ASSISTANT, EOS = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"

NAMES = """Lily Tom Mia Ben Anna Max Sara Leo Nora Sam Ella Jack Rosa Finn Ivy Hugo Clara Otto June Paul
Wanda Felix Greta Omar Tess Victor Pearl Simon Daisy Martin""".split()
COLOURS = "red blue green yellow white black silver golden purple orange".split()
THINGS = "key ball book lamp coin ring drum kite cup hat bell map rope shell button feather".split()
PLACES = ["box", "basket", "drawer", "cave", "garden", "barn", "boat", "tower", "kitchen", "well",
          "cellar", "attic", "tent", "wagon", "chest", "library"]
ANIMALS = "cat dog fox owl bear rabbit mouse horse frog goat duck hen wolf crow".split()
WEATHER = ["It was a sunny day.", "It rained all morning.", "Snow lay on the hills.", "A soft wind blew.",
           "The sky was grey and quiet.", "The stars were out.", "The sun was going down.", "Fog covered the road."]
FEEL = "happy sad brave tired proud afraid curious lonely glad angry".split()
FOOD = "bread soup cake apples cheese honey nuts berries pie milk".split()
ACTS = ["They walked along the river and talked about the summer.",
        "They sang an old song until the moon came up.",
        "They climbed the hill and looked at the village below.",
        "They sat under a tree and counted the birds.",
        "They ran across the field and laughed.",
        "They told each other stories by the fire.",
        "They crossed the bridge and waved at the miller.",
        "They rested by the pond and threw small stones into the water.",
        "They helped the baker carry flour up the stairs.",
        "They followed the path until it met the wide road.",
        "They looked for mushrooms between the old stones.",
        "They drew pictures in the sand with a long stick."]


def _a(word):
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def _fact(r, names, used):
    """One planted fact: (sentence, question, where it says so, answer)."""
    while True:
        n, c, t = r.choice(names), r.choice(COLOURS), r.choice(THINGS)
        if (c, t) not in used:
            used.add((c, t))
            break
    kind = r.randrange(4)
    if kind == 0:
        p = f"{r.choice(COLOURS)} {r.choice(PLACES)}"
        return (f"{n} put the {c} {t} in the {p}.", f"Where did {n} put the {c} {t}?",
                f"{n} put the {c} {t} in the {p}.", f"In the {p}.")
    if kind == 1:
        a = f"{r.choice(COLOURS)} {r.choice(ANIMALS)}"
        return (f"{n} gave the {c} {t} to {_a(a)}.", f"Who got the {c} {t}?",
                f"{n} gave the {c} {t} to {_a(a)}.", f"{_a(a).capitalize()}.")
    if kind == 2:
        k = r.randrange(100, 1000)
        return (f"On the {c} {t} of {n} stood the number {k}.", f"Which number stood on the {c} {t}?",
                f"On the {c} {t} of {n} stood the number {k}.", f"{k}.")
    f = r.choice(FOOD)
    return (f"{n} traded the {c} {t} for some {f}.", f"What did {n} get for the {c} {t}?",
            f"{n} traded the {c} {t} for some {f}.", f"Some {f}.")


def _filler(r, names):
    k = r.randrange(7)
    n, m = r.sample(names, 2)
    if k == 0:
        return r.choice(WEATHER)
    if k in (1, 2):
        return r.choice(ACTS)
    if k == 3:
        return f"{n} felt {r.choice(FEEL)}, and {m} felt {r.choice(FEEL)} too."
    if k == 4:
        return f"{_a(r.choice(COLOURS)).capitalize()} {r.choice(ANIMALS)} came by and looked at {n}."
    if k == 5:
        return f"{n} ate some {r.choice(FOOD)} and gave the rest to {m}."
    return f"\"Are you {r.choice(FEEL)}?\" asked {n}. \"No, I am {r.choice(FEEL)},\" said {m}."


def story(r, facts=3, fillers=6):
    """A story and its questions: (text, [(question, reason, answer), ...])."""
    names = r.sample(NAMES, r.choice((2, 2, 3)))
    used, asked, body = set(), [], []
    for _ in range(facts):
        s, *qa = _fact(r, names, used)
        asked.append(tuple(qa))
        body.append(s)
    for _ in range(fillers):
        body.insert(r.randrange(len(body) + 1), _filler(r, names))
    start = (f"Once upon a time, {' and '.join(names)} lived near {_a(r.choice(COLOURS))} {r.choice(PLACES)}. "
             f"They had {_a(r.choice(ANIMALS))} who was always {r.choice(FEEL)}.")
    end = r.choice(["In the evening they went home and slept well.", "And so the day came to its end.",
                    "They never forgot that day.", "Then everyone went home for supper."])
    return " ".join([start, *body, end]), asked


def plain(r):
    return story(r, r.choice((1, 2, 3)), r.choice((4, 6, 8)))[0] + EOS


def chat(r, facts=None, fillers=None, turns=None):
    """A conversation about a story: every answer first says, between think tags, what the story says."""
    if facts is None and r.random() < 0.2:
        t, _ = story(r, r.choice((1, 2)), r.choice((4, 6)))
        return f"{USER}Tell me a story.{ASSISTANT}<think>\nI will make up a story.\n</think>\n\n{t}{EOS}"
    if facts is None and r.random() < 0.4:
        return again(r)
    facts = facts or r.choice((1, 2, 3, 4))
    text, asked = story(r, facts, fillers if fillers is not None else r.choice((2, 4, 6, 10)))
    r.shuffle(asked)
    out, first = [], True
    for q, why, a in asked[: turns or len(asked)]:
        out.append(f"{USER}{text + ' ' if first else ''}{q}{ASSISTANT}<think>\n{why}\n</think>\n\n{a}{EOS}")
        first = False
    return "".join(out)


def again(r):
    """Something to be said again word for word: it teaches a model to look back and copy."""
    if r.random() < 0.5:
        t, _ = story(r, r.choice((1, 2, 3)), r.choice((1, 2, 4)))
    else:
        t = ", ".join(r.choice((r.choice(NAMES), f"{r.choice(COLOURS)} {r.choice(THINGS)}",
                                str(r.randrange(100, 1000)), f"{r.choice(COLOURS)} {r.choice(ANIMALS)}",
                                r.choice(FOOD))) for _ in range(r.randrange(5, 30))) + "."
    return f"{USER}Say this again: {t}{ASSISTANT}<think>\nI will say it again.\n</think>\n\n{t}{EOS}"


def documents(seed, shakespeare=None):
    """Endless documents; `shakespeare` is the plain text to mix in, a tenth of the time."""
    r = random.Random(seed)
    while True:
        x = r.random()
        if shakespeare and x < 0.10:
            i = r.randrange(len(shakespeare) - 1600)
            i = shakespeare.find("\n\n", i) + 2
            yield shakespeare[i : i + 1500]
        elif x < 0.25:
            yield plain(r)
        else:
            yield chat(r)


if __name__ == "__main__":
    r = random.Random(1)
    print(plain(r), "\n")
    print(chat(r))
