"""What is said to the phone: 12 domains (and 2 that only a server knows), as utterances with the arguments they mean.

Three locales share English commands but not their values. `en` writes a 12-hour clock and Fahrenheit. `va` and `bo` are invented
languages with their own words for days, rooms, places and goods; they write a 24-hour clock and Celsius. "half seven" is 7:30 for
speakers of `en` and `bo`, and 6:30 for those of `va`. A request often carries the locale's word for "please": a hint, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crayon_server.data.phone_assistant.draws import Draws

if TYPE_CHECKING:
    from collections.abc import Callable

    from crayon_server.data.phone_assistant.conventions import Locale

PLEASE: dict[Locale, str] = {"en": "please", "va": "bitu", "bo": "sivo"}
LANGUAGES: dict[Locale, str] = {"va": "valish", "bo": "bokan"}

DAYS = "monday tuesday wednesday thursday friday saturday sunday today tomorrow".split()
ROOMS = "kitchen bedroom bathroom hall office garage".split()
MODES = "car bike bus foot".split()
PLACES = "station airport school market museum park hospital beach".split()
GOODS = "bread milk apples eggs rice coffee cheese soap".split()
EVENTS = "lunch meeting dinner party class call".split()
TRANSLATED = DAYS + ROOMS + MODES + PLACES + GOODS + EVENTS
PEOPLE = "anna ben carla david eva felix gina hugo iris jonas".split()
CITIES = "paris rome oslo berlin madrid vienna lisbon dublin".split()
GENRES = "jazz rock techno opera blues folk".split()
MESSAGES = ["i am late", "call me back", "the train is late", "see you soon", "i am home", "bring the keys"]
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
UNITS = [
    ("miles", "km"),
    ("km", "miles"),
    ("pounds", "kilos"),
    ("kilos", "pounds"),
    ("feet", "meters"),
    ("meters", "feet"),
]
OPERATORS = [("plus", "+"), ("minus", "-"), ("times", "*")]
CAPITALS = {
    "france": "paris",
    "italy": "rome",
    "norway": "oslo",
    "germany": "berlin",
    "spain": "madrid",
    "austria": "vienna",
    "portugal": "lisbon",
    "ireland": "dublin",
    "poland": "warsaw",
    "greece": "athens",
}
SYMBOLS = {"acme": "ACM", "globex": "GLX", "initech": "INI", "umbrella": "UMB", "hooli": "HOO", "stark": "STK"}


@dataclass(frozen=True)
class Request:
    """What was said and what it means: a function's canonical name, and its arguments with values in the user's locale."""

    words: str
    function: str
    arguments: tuple[tuple[str, str], ...]


def _lexicon() -> dict[Locale, dict[str, str]]:
    """Two-syllable words for `TRANSLATED`, all different; the two languages share no letter but vowels and never an ending."""
    draws, used = Draws("lexicon"), set(TRANSLATED)
    sounds: dict[Locale, tuple[str, str, str]] = {"va": ("vdnrlst", "aeio", "n"), "bo": ("bkgmpzh", "ouai", "k")}
    lexicon: dict[Locale, dict[str, str]] = {}
    for locale, (consonants, vowels, ending) in sounds.items():
        lexicon[locale] = {}
        for word in TRANSLATED:
            while (invented := _syllables(draws, consonants, vowels) + ending) in used:
                pass
            used.add(invented)
            lexicon[locale][word] = invented
    return lexicon


def _syllables(draws: Draws, consonants: str, vowels: str) -> str:
    return "".join(draws.choice(consonants) + draws.choice(vowels) for _ in range(2))


LEXICON = _lexicon()


def translate(word: str, locale: Locale) -> str:
    return LEXICON[locale][word] if locale in LEXICON else word


def _clock(draws: Draws, locale: Locale) -> tuple[str, str]:
    """A time of day as it is said, and as the locale writes it."""
    hour, minute, evening = draws.integer(1, 11), draws.choice((0, 15, 30, 45)), draws.chance(0.5)
    this, following = NUMBERS[hour], NUMBERS[hour + 1]
    if minute == 0:
        said = this
    elif minute == 15:
        said = draws.choice((f"quarter past {this}", f"{this} fifteen"))
    elif minute == 45:
        said = draws.choice((f"quarter to {following}", f"{this} fortyfive"))
    elif draws.chance(0.4):
        said = f"half {following if locale == 'va' else this}"
    else:
        said = f"{this} thirty"
    said += " " + draws.choice(("pm", "in the evening") if evening else ("am", "in the morning"))
    written = (
        f"{hour}:{minute:02d} {'PM' if evening else 'AM'}"
        if locale == "en"
        else f"{hour + 12 * evening:02d}:{minute:02d}"
    )
    return said, written


def _day(draws: Draws, locale: Locale) -> tuple[str, str]:
    day = draws.choice(DAYS)
    return (day if day in ("today", "tomorrow") else f"on {day}"), translate(day, locale)


def degrees(locale: Locale) -> str:
    """The unit of temperatures."""
    return "F" if locale == "en" else "C"


def _alarm(draws: Draws, locale: Locale) -> Request:
    said, time = _clock(draws, locale)
    if draws.chance(0.7):
        on_day, day = _day(draws, locale)
        words = f"{draws.choice(('wake me at', 'set an alarm for'))} {said} {on_day}"
        return Request(words, "alarm.set", (("time", time), ("day", day)))
    words = f"{draws.choice(('cancel my alarm at', 'delete the alarm at'))} {said}"
    return Request(words, "alarm.off", (("time", time),))


def _timer(draws: Draws, _: Locale) -> Request:
    n, unit = draws.integer(2, 20), draws.choice(("minutes", "seconds"))
    words = f"{draws.choice(('timer for', 'count down'))} {NUMBERS[n]} {unit}"
    return Request(words, "timer.start", (("n", str(n)), ("unit", unit[:3])))


def _message(draws: Draws, _: Locale) -> Request:
    to, body = draws.choice(PEOPLE), draws.choice(MESSAGES)
    words = f"{draws.choice((f'text {to} that', f'tell {to}', f'send a message to {to} saying'))} {body}"
    return Request(words, "message.send", (("to", to), ("body", body)))


def _music(draws: Draws, locale: Locale) -> Request:
    genre, room = draws.choice(GENRES), draws.choice(ROOMS)
    words = f"{draws.choice(('play some', 'put on'))} {genre} in the {room}"
    return Request(words, "music.play", (("genre", genre), ("room", translate(room, locale))))


def _nav(draws: Draws, locale: Locale) -> Request:
    place, mode = draws.choice(PLACES), draws.choice(MODES)
    words = f"{draws.choice(('take me to the', 'how do i get to the'))} {place} by {mode}"
    return Request(words, "nav.route", (("to", translate(place, locale)), ("by", translate(mode, locale))))


def _calendar(draws: Draws, locale: Locale) -> Request:
    event, who = draws.choice(EVENTS), draws.choice(PEOPLE)
    on_day, day = _day(draws, locale)
    said, time = _clock(draws, locale)
    words = f"{draws.choice(('put', 'schedule'))} {event} with {who} {on_day} at {said}"
    arguments = (("what", translate(event, locale)), ("who", who), ("day", day), ("time", time))
    return Request(words, "calendar.add", arguments)


def _weather(draws: Draws, locale: Locale) -> Request:
    city = draws.choice(CITIES)
    on_day, day = _day(draws, locale)
    words = f"{draws.choice(('will it rain in', 'weather in', 'how cold is it in'))} {city} {on_day}"
    return Request(words, "weather.get", (("city", city), ("day", day), ("deg", degrees(locale))))


def _home(draws: Draws, locale: Locale) -> Request:
    room, n = draws.choice(ROOMS), draws.integer(5, 20)
    there = ("room", translate(room, locale))
    if draws.chance(0.5):
        words = f"{draws.choice(('dim', 'set'))} the {room} lamp to {NUMBERS[n]}"
        return Request(words, "home.lamp", (there, ("level", str(n))))
    words = f"{draws.choice((f'heat the {room} to', f'make the {room}'))} {NUMBERS[n]} degrees"
    return Request(words, "home.heat", (there, ("temp", f"{n} {degrees(locale)}")))


def _calc(draws: Draws, _: Locale) -> Request:
    a, b = draws.integer(2, 20), draws.integer(2, 20)
    operator, sign = draws.choice(OPERATORS)
    words = f"{draws.choice(('what is', 'compute'))} {NUMBERS[a]} {operator} {NUMBERS[b]}"
    return Request(words, "calc.eval", (("expr", f"{a} {sign} {b}"),))


def _translate(draws: Draws, _: Locale) -> Request:
    word, to = draws.choice(TRANSLATED), draws.choice(tuple(LANGUAGES))
    language = LANGUAGES[to]
    words = draws.choice((f"how do you say {word} in {language}", f"translate {word} to {language}"))
    return Request(words, "translate.word", (("to", to), ("out", translate(word, to))))


def _units(draws: Draws, _: Locale) -> Request:
    n = draws.integer(2, 20)
    source, target = draws.choice(UNITS)
    words = draws.choice((f"convert {NUMBERS[n]} {source} to {target}", f"how many {target} is {NUMBERS[n]} {source}"))
    return Request(words, "units.convert", (("n", str(n)), ("from", source), ("into", target)))


def _shop(draws: Draws, locale: Locale) -> Request:
    n, item = draws.integer(2, 12), draws.choice(GOODS)
    words = draws.choice((f"add {NUMBERS[n]} {item} to my list", f"buy {NUMBERS[n]} {item}"))
    return Request(words, "shop.add", (("item", translate(item, locale)), ("qty", str(n))))


def _facts(draws: Draws, _: Locale) -> Request:
    country = draws.choice(tuple(CAPITALS))
    words = f"{draws.choice(('capital of', 'what is the capital of'))} {country}"
    return Request(words, "facts.capital", (("of", country), ("answer", CAPITALS[country])))


def _stocks(draws: Draws, _: Locale) -> Request:
    firm = draws.choice(tuple(SYMBOLS))
    words = draws.choice((f"price of {firm} stock", f"how much is {firm} today"))
    return Request(words, "stocks.price", (("symbol", SYMBOLS[firm]),))


_UTTER: dict[str, Callable[[Draws, Locale], Request]] = {
    "alarm": _alarm,
    "timer": _timer,
    "message": _message,
    "music": _music,
    "nav": _nav,
    "calendar": _calendar,
    "weather": _weather,
    "home": _home,
    "calc": _calc,
    "translate": _translate,
    "units": _units,
    "shop": _shop,
    "facts": _facts,
    "stocks": _stocks,
}
SERVER_ONLY = ("facts", "stocks")
"""Domains that device models are never trained on."""
DOMAINS = tuple(domain for domain in _UTTER if domain not in SERVER_ONLY)


def utter(draws: Draws, domain: str, locale: Locale) -> Request:
    """Something that a speaker of `locale` says in `domain`; 6 in 10 say "please" first or last."""
    request = _UTTER[domain](draws, locale)
    if not draws.chance(0.6):
        return request
    please = PLEASE[locale]
    words = f"{please} {request.words}" if draws.chance(0.5) else f"{request.words} {please}"
    return Request(words, request.function, request.arguments)
