"""Keys of CKKS for tests."""

from dpfl_flower.secagg.ckks_key import PublicKey, SecretKey, make_key


def key_pair(directory):
    files = make_key(directory)
    return PublicKey.load(files.server), SecretKey.load(files.nodes)


def add(public, *ciphertexts):
    """Return the sum of vectors of ciphertexts, as the server adds them."""
    totals = public.zeros(len(ciphertexts[0]))
    for vector in ciphertexts:
        totals = [a + public.read(b) for a, b in zip(totals, vector, strict=True)]
    return [total.serialize() for total in totals]
