"""Programs as JAX traces them, walked."""


def equations(jaxpr):
    """Of a program and of all that are in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_of(eqn):
            yield from equations(inner)


def inner_of(eqn):
    """The programs that an equation holds, as they are written."""
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(one, 'jaxpr', one)
            if hasattr(inner, 'eqns'):
                found.append(inner)
    return found
