//! Stories with planted facts and questions about them, as the demo model was trained on (the same kinds of sentences as
//! `ref-tests/demo-model/corpus.py`; other stories, since the random stream is another). Every question can be answered
//! only while the tokens of its fact are still cached. The same seed gives the same stories, on every platform.

use engine::sample::Rng;

const NAMES: &str = "Lily Tom Mia Ben Anna Max Sara Leo Nora Sam Ella Jack Rosa Finn Ivy Hugo Clara Otto June Paul Wanda \
                     Felix Greta Omar Tess Victor Pearl Simon Daisy Martin";
const COLOURS: &str = "red blue green yellow white black silver golden purple orange";
const THINGS: &str = "key ball book lamp coin ring drum kite cup hat bell map rope shell button feather";
const PLACES: &str =
    "box basket drawer cave garden barn boat tower kitchen well cellar attic tent wagon chest library";
const ANIMALS: &str = "cat dog fox owl bear rabbit mouse horse frog goat duck hen wolf crow";
const FEELINGS: &str = "happy sad brave tired proud afraid curious lonely glad angry";
const FOOD: &str = "bread soup cake apples cheese honey nuts berries pie milk";
const WEATHER: [&str; 8] = [
    "It was a sunny day.",
    "It rained all morning.",
    "Snow lay on the hills.",
    "A soft wind blew.",
    "The sky was grey and quiet.",
    "The stars were out.",
    "The sun was going down.",
    "Fog covered the road.",
];
const ACTS: [&str; 12] = [
    "They walked along the river and talked about the summer.",
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
    "They drew pictures in the sand with a long stick.",
];
const ENDS: [&str; 4] = [
    "In the evening they went home and slept well.",
    "And so the day came to its end.",
    "They never forgot that day.",
    "Then everyone went home for supper.",
];

/// A fact as a story tells it, and the question about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    pub sentence: String,
    pub question: String,
    /// The whole answer, as the demo model gives it.
    pub answer: String,
    /// The words that any right answer contains.
    pub key: String,
}

/// Sentences, some of which are facts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    pub sentences: Vec<String>,
    /// The facts and where they stand among the sentences, in order.
    pub facts: Vec<(usize, Fact)>,
}

impl Story {
    /// The text, and the byte at which sentence `i` of it ends.
    pub fn text(&self, i: usize) -> (String, usize) {
        let end = self.sentences[..=i].join(" ").len();
        (self.sentences.join(" "), end)
    }
}

/// Wording of the planted number: `{colour} {thing} {name} {number}` stand for what they say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wording {
    pub fact: String,
    pub question: String,
    pub answer: String,
}

impl Default for Wording {
    fn default() -> Self {
        Self {
            fact: "On the {colour} {thing} of {name} stood the number {number}.".into(),
            question: "Which number stood on the {colour} {thing}?".into(),
            answer: "{number}.".into(),
        }
    }
}

/// A stream of stories.
pub struct Teller {
    rng: Rng,
}

impl Teller {
    /// The stories of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed) }
    }

    /// Uniform in `0..n` (without bias: what lies above the last whole multiple of n is drawn again).
    pub fn below(&mut self, n: usize) -> usize {
        let n = n.max(1) as u64;
        loop {
            let x = self.rng.next_u64();
            if x < u64::MAX - u64::MAX % n {
                return (x % n) as usize;
            }
        }
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    fn word(&mut self, list: &'static str) -> &'static str {
        let words: Vec<&str> = list.split_whitespace().collect();
        self.pick(&words)
    }

    /// `n` different names.
    fn names(&mut self, n: usize) -> Vec<&'static str> {
        let mut all: Vec<&str> = NAMES.split_whitespace().collect();
        (0..n).map(|_| all.swap_remove(self.below(all.len()))).collect()
    }

    fn two<'a>(&mut self, of: &[&'a str]) -> (&'a str, &'a str) {
        let (i, j) = (self.below(of.len()), self.below(of.len() - 1));
        (of[i], of[j + usize::from(j >= i)])
    }

    fn opening(&mut self, names: &[&str]) -> [String; 2] {
        let (colour, place) = (self.word(COLOURS), self.word(PLACES));
        let near = a(&format!("{colour} {place}"));
        let (animal, feeling) = (a(self.word(ANIMALS)), self.word(FEELINGS));
        [
            format!("Once upon a time, {} lived near {near}.", names.join(" and ")),
            format!("They had {animal} who was always {feeling}."),
        ]
    }

    fn filler(&mut self, names: &[&str]) -> String {
        let (n, m) = self.two(names);
        match self.below(7) {
            0 => self.pick(&WEATHER).into(),
            1 | 2 => self.pick(&ACTS).into(),
            3 => format!("{n} felt {}, and {m} felt {} too.", self.word(FEELINGS), self.word(FEELINGS)),
            4 => {
                let who = format!("{} {}", self.word(COLOURS), self.word(ANIMALS));
                format!("{} came by and looked at {n}.", capital(&a(&who)))
            }
            5 => format!("{n} ate some {} and gave the rest to {m}.", self.word(FOOD)),
            _ => {
                let (x, y) = (self.word(FEELINGS), self.word(FEELINGS));
                format!("\"Are you {x}?\" asked {n}. \"No, I am {y},\" said {m}.")
            }
        }
    }

    fn fact(&mut self, names: &[&str], used: &mut Vec<String>) -> Fact {
        let n = self.pick(names);
        let what = loop {
            let what = format!("{} {}", self.word(COLOURS), self.word(THINGS));
            if !used.contains(&what) {
                used.push(what.clone());
                break what;
            }
        };
        match self.below(4) {
            0 => {
                let key = format!("{} {}", self.word(COLOURS), self.word(PLACES));
                Fact {
                    sentence: format!("{n} put the {what} in the {key}."),
                    question: format!("Where did {n} put the {what}?"),
                    answer: format!("In the {key}."),
                    key,
                }
            }
            1 => {
                let key = format!("{} {}", self.word(COLOURS), self.word(ANIMALS));
                Fact {
                    sentence: format!("{n} gave the {what} to {}.", a(&key)),
                    question: format!("Who got the {what}?"),
                    answer: format!("{}.", capital(&a(&key))),
                    key,
                }
            }
            2 => {
                let key = (100 + self.below(900)).to_string();
                Fact {
                    sentence: format!("On the {what} of {n} stood the number {key}."),
                    question: format!("Which number stood on the {what}?"),
                    answer: format!("{key}."),
                    key,
                }
            }
            _ => {
                let key = self.word(FOOD).to_owned();
                Fact {
                    sentence: format!("{n} traded the {what} for some {key}."),
                    question: format!("What did {n} get for the {what}?"),
                    answer: format!("Some {key}."),
                    key,
                }
            }
        }
    }

    /// A story with so many facts and other sentences, in a random order.
    pub fn story(&mut self, facts: usize, fillers: usize) -> Story {
        let count = 2 + usize::from(self.below(3) == 2);
        let names = self.names(count);
        let mut used = Vec::new();
        let mut body: Vec<(String, Option<Fact>)> =
            (0..facts).map(|_| self.fact(&names, &mut used)).map(|f| (f.sentence.clone(), Some(f))).collect();
        for _ in 0..fillers {
            let at = self.below(body.len() + 1);
            let filler = self.filler(&names);
            body.insert(at, (filler, None));
        }
        let mut story = Story { sentences: self.opening(&names).into(), facts: Vec::new() };
        for (sentence, fact) in body {
            story.facts.extend(fact.map(|f| (story.sentences.len(), f)));
            story.sentences.push(sentence);
        }
        story.sentences.push(self.pick(&ENDS).into());
        story
    }

    /// One number among other sentences: behind `depth` percent of them. They are added until `size` of the sentences, in
    /// whatever unit it counts, reaches `length`.
    pub fn passkey(
        &mut self,
        wording: &Wording,
        depth: usize,
        length: usize,
        mut size: impl FnMut(&str) -> usize,
    ) -> Story {
        let names = self.names(2);
        let number = (100 + self.below(900)).to_string();
        let (colour, thing) = (self.word(COLOURS), self.word(THINGS));
        let fill = |s: &str| {
            let s = s.replace("{colour}", colour).replace("{thing}", thing);
            s.replace("{name}", names[0]).replace("{number}", &number)
        };
        let fact = Fact {
            sentence: fill(&wording.fact),
            question: fill(&wording.question),
            answer: fill(&wording.answer),
            key: number.clone(),
        };
        let mut sentences = Vec::from(self.opening(&names));
        let first = sentences.len();
        let mut total: usize = sentences.iter().map(|s| size(s)).sum::<usize>() + size(&fact.sentence);
        while total < length {
            let filler = self.filler(&names);
            total += size(&filler).max(1);
            sentences.push(filler);
        }
        let at = first + (sentences.len() - first) * depth.min(100) / 100;
        sentences.insert(at, fact.sentence.clone());
        Story { sentences, facts: vec![(at, fact)] }
    }
}

fn a(words: &str) -> String {
    if words.starts_with(['a', 'e', 'i', 'o']) { format!("an {words}") } else { format!("a {words}") }
}

fn capital(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stories_repeat_themselves_and_hold_their_facts() {
        let told = |seed| {
            let mut t = Teller::new(seed);
            (0..50).map(|_| t.story(3, 6)).collect::<Vec<_>>()
        };
        let stories = told(7);
        assert_eq!(stories, told(7));
        assert_ne!(stories, told(8));
        for s in &stories {
            assert_eq!((s.sentences.len(), s.facts.len()), (2 + 3 + 6 + 1, 3));
            for (i, f) in &s.facts {
                assert_eq!(s.sentences[*i], f.sentence);
                assert!(f.sentence.contains(&f.key) && f.answer.contains(&f.key), "{f:?}");
                let (text, end) = s.text(*i);
                assert!(text[..end].ends_with(&f.sentence), "{f:?}");
                // A question that two facts could answer would measure luck.
                assert_eq!(s.facts.iter().filter(|g| g.1.question == f.question).count(), 1);
            }
        }
    }

    #[test]
    fn numbers_lie_at_their_depth() {
        let mut t = Teller::new(1);
        let words = |s: &str| s.split_whitespace().count();
        for (depth, at) in [(0, 0.0), (50, 0.5), (100, 1.0)] {
            let s = t.passkey(&Wording::default(), depth, 200, words);
            let length = words(&s.sentences.join(" "));
            assert!((200..225).contains(&length), "{length}");
            let (i, n) = (s.facts[0].0 - 2, s.sentences.len() - 3);
            assert!((i as f64 / n as f64 - at).abs() < 0.1, "{i} of {n}");
        }
        let wording = Wording { fact: "The key is {number}.".into(), ..Wording::default() };
        assert!(t.passkey(&wording, 0, 0, words).sentences[2].starts_with("The key is "));
    }
}
