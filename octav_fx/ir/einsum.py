"""What an equation of einsum says of its operands."""


def terms_of(equation: str) -> tuple[list[str], str]:
    """Return the letters of each operand and those of the result, without spaces, "..." as it is."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        # Implied: what occurs once, in the order of the alphabet.
        letters = inputs.replace(",", "").replace(".", "")
        output = ("..." if "." in inputs else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))
    return inputs.split(","), output


def summed_axes(equation: str) -> list[int | None]:
    """Return the axis of each operand that products are summed over; counted from the back behind an ellipsis.

    Of several such axes it is the last of the first operand, and the same letter in all, so that rows along it meet.
    None: there is none, or an operand has it twice.
    """
    terms, output = terms_of(equation)
    shared = [c for c in terms[0].replace(".", "") if c not in output and all(term.count(c) == 1 for term in terms)]
    if not shared:
        return [None] * len(terms)
    return [_axis(term, shared[-1]) for term in terms]


def _axis(term: str, letter: str) -> int:
    before, dots, after = term.partition("...")
    return after.index(letter) - len(after) if dots and letter in after else before.index(letter)
