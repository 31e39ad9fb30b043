"""The vocabulary of mathematical answers: functions, constants, units, and words that count."""

FUNCTIONS = frozenset(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp".split()
)
CONSTANTS = frozenset(("pi", "infty", "infinity", "oo", "inf", "theta"))
SEPARATORS = frozenset(("and", "or"))
# Spellings of one unit; what is not here is compared as it is spelled. No unit is converted into
# another. An empty name says nothing: 5 units are 5.
_SPELLINGS = {
    "dollar": "dollars usd buck bucks",
    "cent": "cents",
    "euro": "euros eur",
    "pound sterling": "gbp",
    "pound": "pounds lb lbs",
    "ounce": "ounces oz",
    "ton": "tons tonne tonnes",
    "kg": "kilogram kilograms kilo kilos kgs",
    "g": "gram grams",
    "mg": "milligram milligrams",
    "km": "kilometer kilometers kilometre kilometres kms",
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres cms",
    "mm": "millimeter millimeters millimetre millimetres",
    "inch": "inches in",
    "foot": "feet ft",
    "yard": "yards yd yds",
    "mile": "miles mi",
    "liter": "liters litre litres l",
    "ml": "milliliter milliliters millilitre millilitres",
    "gallon": "gallons gal",
    "second": "seconds sec secs s",
    "minute": "minutes min mins",
    "hour": "hours hr hrs h",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "mile / hour": "mph",
    "km / hour": "kph kmh",
    "degree": "degrees deg",
    "radian": "radians rad rads",
    "percent": "percents pct percentage",
    "square": "sq",
    "cubic": "cu",
    "/": "per",
    "": "unit units point points of the a an exactly total totally ways way",
}
UNITS = {
    spelling: name
    for name, spellings in _SPELLINGS.items()
    for spelling in (*((name,) if " " not in name else ()), *spellings.split())
} | {"/": "/"}
# Short nouns that people count; longer ones need no list.
NOUNS = frozenset(
    "men man cup cups egg eggs bag bags box car cars cat cats dog dogs pen pens cow cows hen hens "
    "pig pigs bus toy toys hat hats cap caps can cans jar jars pie pies kid kids boy boys girl "
    "girls tie ties red blue".split()
)
# Words that change the number before them, or make a sentence of it.
KEEP_OUT = frozenset(
    "to million millions billion billions trillion trillions thousand thousands hundred hundreds "
    "tens dozen dozens score scores half halves third thirds fourth fourths quarter quarters "
    "fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths "
    "hundredth hundredths thousandth thousandths squared cubed less more fewer below above "
    "negative minus plus times over under not none about around approximately roughly nearly "
    "almost between least most remainder mod modulo base if else then for when where while "
    "because since so but with without by into divided multiplied is are was be equals equal "
    "maybe perhaps possibly either neither nor except only root square-root power log each both "
    "unless until true false nan yes no odd even lambda import exec eval print return otherwise "
    "any all double triple twice once pairs pair zero one two three four five six seven eight "
    "nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety".split()
)
