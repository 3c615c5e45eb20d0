// XXH3-64 with a seed, as specified in https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.

const MASK = (1n << 64n) - 1n;
const [P32_1, P32_2, P32_3] = [0x9e3779b1n, 0x85ebca77n, 0xc2b2ae3dn];
const [P64_1, P64_2, P64_3, P64_4, P64_5] = [
  0x9e3779b185ebca87n, 0xc2b2ae3d27d4eb4fn, 0x165667b19e3779f9n, 0x85ebca77c2b2ae63n, 0x27d4eb2f165667c5n,
];
const [MX1, MX2] = [0x165667919e3779f9n, 0x9fb21c651e98df25n];
const SECRET = Buffer.from(
  "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221" +
  "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8" +
  "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb" +
  "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e",
  "hex",
);

const u32 = (bytes, at) => BigInt(bytes.readUInt32LE(at));
const u64 = (bytes, at) => bytes.readBigUInt64LE(at);
const rotate = (x, by) => ((x << by) | (x >> (64n - by))) & MASK;
const fold = (a, b) => {
  const product = (a & MASK) * (b & MASK);
  return (product & MASK) ^ (product >> 64n);
};

function swap(x, size) {
  let out = 0n;
  for (let n = 0; n < size; n++) out = (out << 8n) | ((x >> BigInt(8 * n)) & 255n);
  return out;
}

function avalanche(h) {
  h ^= h >> 37n;
  h = (h * MX1) & MASK;
  return h ^ (h >> 32n);
}

function avalanche64(h) {
  h = ((h ^ (h >> 33n)) * P64_2) & MASK;
  h = ((h ^ (h >> 29n)) * P64_3) & MASK;
  return h ^ (h >> 32n);
}

const mix16 = (data, at, key, seed) =>
  fold(u64(data, at) ^ ((u64(SECRET, key) + seed) & MASK), u64(data, at + 8) ^ ((u64(SECRET, key + 8) - seed) & MASK));

function upTo16(data, seed) {
  const length = data.length;
  if (length === 0) return avalanche64(seed ^ u64(SECRET, 56) ^ u64(SECRET, 64));
  if (length <= 3) {
    const [first, middle, last] = [data[0], data[length >> 1], data[length - 1]].map(BigInt);
    const combined = (first << 16n) | (middle << 24n) | last | (BigInt(length) << 8n);
    return avalanche64(combined ^ (((u32(SECRET, 0) ^ u32(SECRET, 4)) + seed) & MASK));
  }
  if (length <= 8) {
    const mixed = seed ^ (swap(seed & 0xffffffffn, 4) << 32n);
    const input = u32(data, length - 4) + (u32(data, 0) << 32n);
    let h = input ^ (((u64(SECRET, 8) ^ u64(SECRET, 16)) - mixed) & MASK);
    h ^= rotate(h, 49n) ^ rotate(h, 24n);
    h = (h * MX2) & MASK;
    h ^= (h >> 35n) + BigInt(length);
    h = (h * MX2) & MASK;
    return h ^ (h >> 28n);
  }
  const low = u64(data, 0) ^ (((u64(SECRET, 24) ^ u64(SECRET, 32)) + seed) & MASK);
  const high = u64(data, length - 8) ^ (((u64(SECRET, 40) ^ u64(SECRET, 48)) - seed) & MASK);
  return avalanche((BigInt(length) + swap(low, 8) + high + fold(low, high)) & MASK);
}

function upTo240(data, seed) {
  const length = data.length;
  let sum = BigInt(length) * P64_1;
  if (length <= 128) {
    for (let i = (length - 1) >> 5; i >= 0; i--) {
      sum += mix16(data, 16 * i, 32 * i, seed) + mix16(data, length - 16 * (i + 1), 32 * i + 16, seed);
    }
    return avalanche(sum & MASK);
  }
  for (let i = 0; i < 8; i++) sum += mix16(data, 16 * i, 16 * i, seed);
  sum = avalanche(sum & MASK);
  for (let i = 8; i < length >> 4; i++) sum += mix16(data, 16 * i, 16 * (i - 8) + 3, seed);
  return avalanche((sum + mix16(data, length - 16, 119, seed)) & MASK);
}

function long(data, seed) {
  const length = data.length;
  const secret = Buffer.from(SECRET);
  for (let at = 0; at < 192; at += 16) {
    secret.writeBigUInt64LE((u64(SECRET, at) + seed) & MASK, at);
    secret.writeBigUInt64LE((u64(SECRET, at + 8) - seed) & MASK, at + 8);
  }
  const sums = [P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1];
  const accumulate = (at, key) => {
    for (let lane = 0; lane < 8; lane++) {
      const value = u64(data, at + 8 * lane);
      const keyed = value ^ u64(secret, key + 8 * lane);
      sums[lane ^ 1] = (sums[lane ^ 1] + value) & MASK;
      sums[lane] = (sums[lane] + (keyed & 0xffffffffn) * (keyed >> 32n)) & MASK;
    }
  };
  const stripes = (length - 1) >> 6;
  for (let stripe = 0; stripe < stripes; stripe++) {
    accumulate(64 * stripe, 8 * (stripe % 16));
    if (stripe % 16 === 15) {
      for (let lane = 0; lane < 8; lane++) {
        const sum = sums[lane];
        sums[lane] = ((sum ^ (sum >> 47n) ^ u64(secret, 128 + 8 * lane)) * P32_1) & MASK;
      }
    }
  }
  accumulate(length - 64, 121);
  let result = BigInt(length) * P64_1;
  for (let i = 0; i < 4; i++) {
    result += fold(sums[2 * i] ^ u64(secret, 11 + 16 * i), sums[2 * i + 1] ^ u64(secret, 19 + 16 * i));
  }
  return avalanche(result & MASK);
}

/** The hash of a Buffer, as a BigInt; `seed` is a BigInt from 0 to 2^64 - 1. */
export function xxh3(data, seed) {
  if (data.length <= 16) return upTo16(data, seed);
  return data.length <= 240 ? upTo240(data, seed) : long(data, seed);
}
