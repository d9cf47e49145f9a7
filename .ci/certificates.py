"""Makes the certificates for tests that smtpmock.py contains, and prints them as they stand there:

    python .ci/certificates.py

It needs cryptography of PyPI. Nothing keeps the key of the authority, so each run makes a new authority. All is valid
from 2000 on, so that it is also valid where a test has set the clock back.
"""

import base64
import datetime
import ipaddress
import textwrap
import zlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)
KEY_USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
    "encipher_only decipher_only"
).split()


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def sign(
    subject: str, key: ec.EllipticCurvePublicKey, until: int, *extensions: tuple[x509.ExtensionType, bool]
) -> bytes:
    builder = (
        x509.CertificateBuilder(name("smtpmock CA"), name(subject), key, x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(until, 1, 1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.DER)


def usage(*names: str) -> tuple[x509.KeyUsage, bool]:
    return x509.KeyUsage(**{name: name in names for name in KEY_USAGES}), True


def issue(until: int, *names: x509.GeneralName) -> bytes:
    return sign(
        str(names[0].value),
        key.public_key(),
        until,
        (x509.BasicConstraints(ca=False, path_length=None), True),
        usage("digital_signature"),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(names), False),
    )


def make_short_key() -> bytes:
    """The key as in RFC 5915, without the public half, which follows from the private one."""
    curve = bytes.fromhex("a00a06082a8648ce3d030107")  # P-256
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    content = b"\x02\x01\x01\x04\x20" + secret + curve
    return b"\x30" + bytes([len(content)]) + content


authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
ca = sign(
    "smtpmock CA",
    authority.public_key(),
    2100,
    (x509.BasicConstraints(ca=True, path_length=0), True),
    usage("key_cert_sign", "crl_sign"),
)
parts = ca, make_short_key(), issue(2100, *LOCAL), issue(2001, *LOCAL), issue(2100, x509.DNSName("wrong-host.invalid"))
packed = zlib.compress(b"|next|".join(parts), 9)
print(*textwrap.wrap(base64.b64encode(packed).decode(), 120), sep="\n")
