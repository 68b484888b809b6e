"""Awkward class names: formulas, terminal commands, other scripts, bytes in another encoding."""

AWKWARD = {
    "dollars": "$$",
    "more dollars": "$$$$",
    "prices": "US$ 5 to US$ 10",
    "two dollars": "a$b$c",
    "broken formula": r"$\frac{$",
    "unknown command": r"$\nosuch{x}$",
    "accent": "été",
    "wide letters": "日本 語",
    "terminal command": "\x1b]0;x\x07",
    "line break": "a\nb",
    "right to left": "a\u202eb",
    "isolate": "\u2066a\u2069",
    "undecodable": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "line separator": "a\u2028b",
    "next line": "a\x85b",
    "markup": "<b>*a*</b> | `x`",
    "emoji": "\U0001f469\u200d\U0001f33e",
    "long": "x" * 300,
    "empty": "",
}
