"""Write tokenizer_goldens.json.gz: thousands of strings with the ids that OpenAI's own tokenizer gives them.

The oracle is the SimpleTokenizer of the openai-clip package, with the merges table that the package brings along, so
neither miniclip's code nor its table takes part. To run it again (ftfy 6.3.1, regex, and nothing of miniclip):

    pip download --no-deps --no-binary :all: openai-clip==1.0.1
    tar xf openai-clip-1.0.1.tar.gz
    python tests/data/make_tokenizer_goldens.py openai-clip-1.0.1

The strings are composed here: named traps, one or more for every step of the cleaning, seeded mixtures of words of
many scripts, and English words.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import platform
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import ftfy.bad_codecs  # noqa: F401 (registers sloppy-windows-1252)

OUT = Path(__file__).with_name("tokenizer_goldens.json.gz")
COMPOSED = 2400
VOCABULARY = 400

# Common words a caption may hold, by script or language.
WORDS = {
    "english": "cat dog photo bicycle Mountain RIVER iPhone can't we'll they've I'm dog's it'd you're café naïve",
    "french": "chât forêt garçon œuvre l'été où élève déjà Noël français aujourd'hui cœur",
    "german": "Straße Mädchen grün Äpfel Übung Fuß schön Größe STRASSE GROẞ öffnen Käse",
    "spanish": "niño mañana ¿dónde? ¡hola! corazón pingüino azúcar Ñandú jamón árbol",
    "portuguese": "coração pão maçã irmão você avô são lâmpada água três",
    "polish": "żółw gęś łódź ćma źrebię dąb śnieg ŻÓŁTY książka ręka",
    "czech": "kůň řeka žába děti šťastný čokoláda ÚŘAD ďábel",
    "turkish": "İstanbul ışık çiçek güneş şeker öğretmen IŞIK DİYARBAKIR kırmızı",
    "vietnamese": "chó mèo bức ảnh đường phở người Việt nước cây đẹp quyển",
    "icelandic": "þorp eldfjall hús sjór ÞÓR ðað æði",
    "greek": "γάτα σκύλος ΟΔΟΣ θάλασσα ήλιος ΣΟΦΟΣ βιβλίο φως Ελλάδα ψυχή",
    "russian": "кошка собака ёлка Москва СНЕГ объезд поезд синий день щука",
    "ukrainian": "їжак ґанок Київ м'яч єнот вікно ПІСНЯ",
    "georgian": "კატა ძაღლი მთა მზე თბილისი წყალი ყვავილი",
    "armenian": "կատու շուն լեռ արև Երևան ջուր ծաղիկ և",
    "hebrew": "חתול כלב ים שמש ירושלים שָׁלוֹם ספר",
    "arabic": "قطة كلب بحر شمس القاهرة مُحَمَّد كتاب لا الله ٣٤٥",
    "persian": "گربه سگ دریا خورشید تهران می‌روم ۱۲۳ پنجره",
    "urdu": "بلی کتا پہاڑ سورج لاہور ہے پانی",
    "hindi": "बिल्ली कुत्ता पहाड़ सूरज दिल्ली पानी क्षत्रिय १२३ हिन्दी",
    "bengali": "বিড়াল কুকুর নদী সূর্য ঢাকা বাংলা ৪৫৬",
    "tamil": "பூனை நாய் மலை கடல் தமிழ் சூரியன்",
    "telugu": "పిల్లి కుక్క సూర్యుడు నది తెలుగు",
    "sinhala": "බළලා බල්ලා ගඟ හිරු ශ්‍රී",
    "thai": "แมว สุนัข ภูเขา น้ำ กรุงเทพ ผู้หญิง ดวงอาทิตย์",
    "lao": "ແມວ ໝາ ພູ ນ້ຳ ວຽງຈັນ",
    "khmer": "ឆ្មា ឆ្កែ ភ្នំ ទឹក ខ្មែរ",
    "burmese": "ကြောင် ခွေး တောင် ရေ မြန်မာ",
    "tibetan": "བོད་ཡིག རི ཆུ ཉི་མ",
    "amharic": "ድመት ውሻ ተራራ ፀሐይ አዲስ",
    "mongolian": "муур нохой ᠮᠣᠩᠭᠣᠯ нар",
    "cherokee": "ᏪᏌ ᎩᎵ ᏣᎳᎩ ꮳꮃꭹ",
    "chinese": "猫 狗 一张照片 山水 北京 红色的苹果 龍 繁體字 廣東話 𠮷野家 々",
    "japanese": "ねこ イヌ 写真 東京タワー ガギグ パピプ ﾊﾝｶｸ ー、。 富士山",
    "korean": "고양이 강아지 사진 서울 바다 한국어 햇빛 ㅋㅋㅋ",
    "emoji": "😀 🐱 🐶 ❤️ ❤ 👍🏽 👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 🇯🇵 1️⃣ ☃️ 🧑🏿‍🤝‍🧑🏻 ✈︎ 🫠",
    "numbers": "7 42 1984 3.14 1,000,000 -5 ½ ²³ Ⅷ ⅷ ① ٣ ４２ 1e-3 50% $9.99 €5 10°C #1 x86",
    "symbols": "& < > <b> © ® ™ … — – • → ≠ ∞ ± § ¶ € £ ¥ ° † ♥ ★ ■ ♪ \\ / | ~ ^ ` @ _ {} [] () === ... !!! ?!?",
    "code": "foo_bar() CamelCase user@example.org http://example.org/a?b=c&d=e C:\\temp #hashtag @name <p>",
}  # fmt: skip

SEPARATORS = [" "] * 12 + ["  ", "", ", ", "-", "/", " & ", "'", "’", '"', ": ", "\n", "\t", "\u00a0", "\u3000", "_"]
ENDINGS = [""] * 8 + [".", "!", "?", "...", " ", "'s", "’s", ";", '"', "”", "\n"]
CHANGES: list[Callable[[str], str]] = [
    *[str] * 8,
    str.upper,
    str.title,
    str.swapcase,
    html.escape,
    lambda text: html.escape(html.escape(text)),
    *[lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")],
]


def mojibake(text: str, times: int = 1) -> str:
    """What becomes of UTF-8 that is read as Windows-1252, as web browsers understand it: Ã© for é."""
    for _ in range(times):
        text = text.encode("utf-8").decode("sloppy-windows-1252")
    return text


def traps() -> Iterator[tuple[str, str]]:
    """(name, text) for everything known to separate one CLIP tokenizer from another."""
    cases: dict[str, list[str]] = {
        "empty": [""],
        "white space only": [" ", "   \t\n ", "\u00a0", "\u2003\u3000", "\x1c\x1d\x1e\x1f", "\x85", "\u2028\u2029"],
        "curly apostrophe": [
            "don’t", "it’s a dog’s life", "we’ll", "I’m", "they’ve", "you’re", "she’d", "‘tis", "rock ’n’ roll",
        ],
        "curly quote": ["“quoted”", "„unten“", "‚single‘", "‛odd‟", "a “photo” of a ‘cat’", "«guillemets»", "‹one›"],
        "straight quote": [
            "don't", "it's a dog's life", "'s 't 're 've 'm 'll 'd", "DON'T", "'S", "IT'LL", "o'clock", "'''", "dogs'",
        ],
        "HTML entity": [
            "cats &amp; dogs", "&lt;b&gt;", "&quot;x&quot;", "&#39;s", "&#x27;t", "&nbsp;a&nbsp;", "&eacute;t&eacute;",
            "&hellip;", "&copy; 2021", "&euro;5", "AT&T", "a & b", "R&D;", "&", "&&", "&;", "&unknown;", "&amp", "&lt",
            "&ampx", "&notit;", "&notin;", "&#128;", "&#0;", "&#xD800;", "&#1114112;", "&#x1F600;", "&zwj;",
            "&#13;&#10;", "&lt;|endoftext|&gt;", "<&amp;>", "&Eacute;COLE", "&fflig;", "&ThinSpace;x&Tab;y&NewLine;z",
        ],
        "HTML entity escaped twice": [
            "cats &amp;amp; dogs", "&amp;lt;b&amp;gt;", "&amp;#39;s", "don&amp;rsquo;t", "&amp;nbsp;x&amp;nbsp;",
        ],
        "HTML entity escaped three times": [
            "cats &amp;amp;amp; dogs", "&amp;amp;lt;b&amp;amp;gt;", "&amp;amp;amp;amp;",
        ],
        "entities beside a tag": [
            "<i>cats &amp; dogs</i>", "<br>&nbsp;don&rsquo;t", "3 &lt; 4 < 5 &amp;lt; 6", "<p>&amp;quot;x&amp;quot;",
            "<p>&amp;amp;lt;", "<b>d&eacute;j&agrave;</b>", "<&fflig;", "<&#28;a&#31;", "<&#x85;a&nbsp;",
            "<&ldquo;x&rdquo;",
        ],
        "ligature": ["ﬁsh", "oﬃce", "ﬂower", "aﬀair", "ﬀﬁﬂﬃﬄﬅﬆ", "ĳs", "ǆ ǅ Ǆ ǌ", "Æsop œuvre", "ﬕ", "שּׁ"],
        "full-width": [
            "ＡＢＣ　ａｂｃ", "１２３", "ｃａｔ！", "ﾊﾝｶｸ ｶﾀｶﾅ", "（全角）", "￥１００", "＆ａｍｐ；",
            "＜｜ｅｎｄｏｆｔｅｘｔ｜＞",
        ],
        "byte order mark": ["\ufeffa photo", "a\ufeffb", "\ufeff", "\ufeff \ufeff", "ï»¿a photo", "\ufffea"],
        "C0 control": [
            "a\x00b", "a\x01b", "a\x07b", "a\x08b", "a\x0bb", "a\x0cb", "a\x0eb", "a\x1ab", "a\x7fb", "\x00",
            "\x1b[31mred\x1b[0m",
        ],
        "C1 control": ["a\x80b", "a\x85b", "a\x92s", "\x93quoted\x94", "a\x9fb", "don\x92t", "\x85", "5\x80"],
        "format control": [
            "a\u200bb", "a\u200cb", "a\u200db", "a\u2060b", "a\u00adb", "\u202eabc\u202c", "a\u2066b\u2069",
            "a\ufff9b\ufffab\ufffb", "a\U000e0041b",
        ],
        "mojibake": [
            mojibake("café"), mojibake("don’t"), mojibake("“x”"), mojibake("naïve Æsop"), mojibake("日本"),
            mojibake("✔ ok"), mojibake("€5"), mojibake("5°"), "â€“", "Ã", "Ã©", "Â£5", "Â", "Ã Â", "l’humanitÃ©",
            "schÃ¶n", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "voilÃ  le travail",
        ],
        "mojibake twice": [mojibake("café", 2), mojibake("don’t", 2), mojibake("é", 2)],
        "mojibake of another code page": ["caf├⌐", "РїСЂРёРІРµС‚", "Ã¨ Ã  ŕ", "ÅÄ", "CafÈ", "ă€Śĺ°ť"],
        "Greek final sigma": ["ΟΔΟΣ", "ΣΑΣ", "Σ", "ΣΣ", "ΟΔΟΣ ΣΟΦΟΣ", "ΑΣ.", "ΑΣΑ", "ςσΣ", "Α'Σ", "ΑΣ'Α", "Σας"],
        "special token, typed": [
            "<|endoftext|>", "<|startoftext|>", "a<|endoftext|>b", "<|startoftext|>a<|endoftext|>",
            "<|endoftext|><|endoftext|>", "<|endoftext", "endoftext|>", "<| endoftext |>", "<|end of text|>",
        ],
        "special token, upper case": ["<|ENDOFTEXT|>", "<|EndOfText|>", "<|STARTOFTEXT|>", "A<|ENDOFTEXT|>B"],
        "special token, long s": ["<|ſtartoftext|>", "<|ſTARTOFTEXT|>", "<|ﬆartoftext|>"],
        "long s": ["it'ſ", "'ſ", "it’ſ", "Congreſs", "ſ", "'ſa", "ſ's"],
        "Kelvin and Angstrom": ["300 \u212a", "10 \u212b", "'\u212a", "\u2126"],
        "dotted and dotless i": ["İ", "ı", "I İ ı i", "İSTANBUL", "i\u0307"],
        "sharp s": ["ß", "ẞ", "STRASSE Straße"],
        "accents": [
            "a café", "crème brûlée", "Ålesund", "ÀÉÎÕÜ", "žluťoučký", "x\u0301\u0302\u0303", "\u0301", "\u0301a",
        ],
        "NFC": [unicodedata.normalize("NFC", text) for text in ("Amélie", "Å", "각", "が", "ậ")],
        "NFD": [unicodedata.normalize("NFD", text) for text in ("Amélie", "Å", "각", "が", "ậ")],
        "marks out of order": ["a\u0323\u0302", "a\u0302\u0323", "q\u0307\u0323", "q\u0323\u0307", "क\u093c", "\u0958"],
        "no-break and other spaces": [
            "a\u00a0b", "a\u2009b", "a\u202fb", "a\u3000b", "a\u1680b", "a\u205fb", "a\u180eb", "a\u2800b",
            "\u00a0a\u00a0",
        ],
        "line ends": [
            "a\nb", "a\r\nb", "a\rb", "a\n\n\nb", "a\x0bb", "a\x0cb", "a\x85b", "a\u2028b", "a\u2029b", "\na\n",
            "a \n \t b",
        ],
        "separators \\x1c-\\x1f": [
            "a\x1cb", "a\x1db", "a\x1eb", "a\x1fb", "\x1ca\x1f", "a \x1c b", "a&#28;b", "&#28;", "a&#x85;b",
            "&#31;a&#31;",
        ],
        "tab": ["a\tb", "\ta", "a\t\tb", "a&Tab;b"],
        "URL": [
            "http://example.org", "https://www.example.org/a/b?c=d&e=f#g", "see example.org.", "ftp://x.y", "a@b.co",
            "?copy=1&lt=2&amp;x",
        ],
        "digits": [
            "0", "42", "1984", "3.14159", "1,000", "2nd", "4x4", "١٢٣", "१२३", "๑๒๓", "Ⅻ", "¼", "x²", "①②", "𝟏𝟐",
            "〇一二",
        ],
        "mathematical letters": ["𝐛𝐨𝐥𝐝", "𝕏", "𝓬𝓪𝓽", "ℵ", "ª º", "ᴬᴮ", "ⓐⓑ", "🅰🅱"],
        "punctuation runs": [
            "!!!", "...", "…", "?!?!", "-----", "=====", "~~~", "***", "@@@", "###", "$$$", "a,b;c:d", "(((a)))",
            "a--b", ">_<", ":-)", "¯\\_(ツ)_/¯", "!" * 40, "." * 50, "-=" * 20, "'\"'\"'", "a.b.c.", "<|<|<|", "|>|>",
            "<||>",
        ],
        "repeated letters": [
            *("a" * n for n in (2, 3, 4, 5, 7, 8, 13, 21, 34, 55, 89)), "ha" * 20, "日" * 15, "é" * 17, "o" * 30 + "h",
        ],
        "emoji": ["😀", "😀😀😀", "a😀b", "☺", "☺️", "👍🏽", "👍🏿👍🏻", "🇩🇪🇺🇸", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "✂︎"],
        "emoji joined": ["👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🧑🏿‍🤝‍🧑🏻", "👩\u200d", "\u200d👩", "❤️‍🔥"],
        "lone surrogate": ["\ud800", "a\udc00b", "\udfff", "\ud800\ud800", "\udc00\ud800", "caf\udce9"],
        "surrogates apart": ["\ud83d \ude00", "\ude00\ud83d"],  # (JSON would make one character of a pair in order)
        "noncharacter and private use": ["\uffff", "\ufffd", "\ue000", "\U0010ffff", "\ufdd0", "\U000f0000"],
        "unassigned": ["\u0378", "a\u0378b"],
        "capital without a pair": ["ǅ", "ᾈ", "ŉ", "ΐ", "ﬀ", "Ꭰ", "Ა", "𐐀", "Ⓐ", "Ⅷ"],
        "long word": [
            "pneumonoultramicroscopicsilicovolcanoconiosis", "donaudampfschifffahrtsgesellschaft" * 3,
            "abcdefghijklmnopqrstuvwxyz" * 5, "x1" * 40,
        ],
        "long text": ["a photo of a very " + "very " * 100 + "long text", "1 " * 90, "word," * 60],
    }  # fmt: skip
    for name, texts in cases.items():
        for text in texts:
            yield name, text


def composed(source: random.Random) -> Iterator[tuple[str, str]]:
    """(script, text): a few words of one script, now and then of a second one, joined, escaped, normalised."""
    scripts = list(WORDS)
    while True:
        script = source.choice(scripts)
        words = WORDS[script].split()
        if source.random() < 0.25:
            words = words + WORDS[source.choice(scripts)].split()
        text = source.choice(words)
        for _ in range(source.randrange(6)):
            text += source.choice(SEPARATORS) + source.choice(words)
        text = source.choice(CHANGES)(text + source.choice(ENDINGS))
        yield script, mojibake(text) if source.random() < 0.06 else text


def long_words(source: random.Random) -> Iterator[tuple[str, str]]:
    """("300 letters", text): single words in which merges compete, over alphabets from one letter up."""
    for alphabet in ("a", "ab", "aab", "haha", "etaoin", "etaoinshrdlucmf", "abcdefghijklmnopqrstuvwxyz", "=-", "éèa"):
        for length in (299, 300):
            yield "300 letters", "".join(source.choice(alphabet) for _ in range(length))


def from_vocabulary(source: random.Random, words: list[str]) -> Iterator[tuple[str, str]]:
    """("vocabulary", text): ordinary English words, as the table itself has them, to reach many of its merges."""
    while True:
        yield "vocabulary", " ".join(source.choice(words) for _ in range(source.randrange(6, 18)))


def strings(words: list[str]) -> list[tuple[str, str]]:
    """All the cases, each text once: the traps, ``COMPOSED`` mixtures and ``VOCABULARY`` texts of the table's words."""
    texts: dict[str, str] = {}
    for name, text in [*traps(), *long_words(random.Random(300))]:
        texts.setdefault(text, name)
    sources = [(COMPOSED, composed(random.Random(2021))), (VOCABULARY, from_vocabulary(random.Random(103), words))]
    for count, source in sources:
        total = len(texts) + count
        while len(texts) < total:
            name, text = next(source)
            texts.setdefault(text, name)
    return [(name, text) for text, name in texts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="the unpacked openai-clip-1.0.1")
    folder = parser.parse_args().sdist
    # By path: importing the package itself would import torchvision.
    spec = importlib.util.spec_from_file_location("simple_tokenizer", folder / "clip" / "simple_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    oracle = module.SimpleTokenizer()
    version = next(line for line in (folder / "PKG-INFO").read_text().splitlines() if line.startswith("Version: "))
    merges = "".join(" ".join(pair) + "\n" for pair in oracle.bpe_ranks)  # in the order of their ranks
    words = [token.removesuffix("</w>") for token in oracle.encoder if token.endswith("</w>")]

    goldens = {
        "oracle": {
            "openai-clip": version.removeprefix("Version: "),
            "ftfy": importlib.metadata.version("ftfy"),
            "regex": importlib.metadata.version("regex"),
            "python": platform.python_version(),
            "unicode": unicodedata.unidata_version,
        },
        "merges": {"count": len(oracle.bpe_ranks), "sha256": hashlib.sha256(merges.encode()).hexdigest()},
        "cases": [
            [name, text, oracle.encode(text)]
            for name, text in strings([word for word in words if word.isascii() and word.isalpha()])
        ],
    }
    # ASCII, because UTF-8 has no lone surrogates; no time stamp, so that the same strings make the same file.
    data = json.dumps(goldens, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    OUT.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
    print(f"{OUT}: {len(goldens['cases'])} strings, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
