// Reads rows of a file table. Written from docs/table-format.md alone.
//
//     node reader.mjs ROOT NAME[@VERSION] ID...    prints {"table": ..., "rows": [[[...], ...], ...]}
//     node reader.mjs --hash SEED_HEX DATA_HEX     prints the XXH3-64 of the data

import { createHash } from "node:crypto";
import fs from "node:fs";
import path from "node:path";

import { xxh3 } from "./xxh3.mjs";

const MASK = (1n << 64n) - 1n;
const KNOWN = new Set(["layout", "parent", "changed", "appended", "ranks", "basis", "frequent_rows", "edits"]);
const CODECS = {
  fp32: { size: (d) => 4 * d, value: (block, i) => block.readFloatLE(4 * i) },
  fp16: { size: (d) => 2 * d, value: (block, i) => half(block.readUInt16LE(2 * i)) },
  bf16: { size: (d) => 2 * d, value: (block, i) => bfloat16(block, 2 * i) },
  int8: { size: (d) => 4 + d, value: (block, i) => Math.fround(block.readFloatLE(0) * block.readInt8(4 + i)) },
  int4: { size: (d) => 2 * Math.ceil(d / 32) + Math.ceil(d / 2), value: int4 },
};

function bfloat16(block, at) {
  const wide = Buffer.alloc(4);
  block.copy(wide, 2, at, at + 2);
  return wide.readFloatLE(0);
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

function int4(block, i, d) {
  const scale = bfloat16(block, 2 * Math.floor(i / 32));
  const [codes, h] = [2 * Math.ceil(d / 32), Math.floor(d / 2)];
  if (i === 2 * h) return scale * block.readInt8(codes + h);
  const nibble = i < h ? block[codes + i] & 15 : block[codes + i - h] >> 4;
  return scale * (nibble > 7 ? nibble - 16 : nibble);
}

class Table {
  constructor(root, name, version) {
    this.root = root;
    this.folder = path.join(root, name, version);
    const text = fs.readFileSync(path.join(this.folder, "manifest.json"), "utf8");
    const fields = JSON.parse(text);
    const canonical = text.replace(/\n$/, "").replace(`"digest":"${fields.digest}",`, "");
    if (fields.format !== 2) throw new Error(`format ${fields.format} is unknown`);
    if (createHash("sha256").update(canonical).digest("hex") !== fields.digest) throw new Error("wrong digest");
    const unknown = (fields.requires ?? []).filter((field) => !KNOWN.has(field));
    if (unknown.length) throw new Error(`the table requires ${unknown}`);
    if ((fields.layout ?? "shards") !== "shards") throw new Error(`layout ${fields.layout} is unknown`);
    if (fields.name !== name || fields.version !== version) throw new Error("manifest of another table");
    if (!CODECS[fields.codec]) throw new Error(`codec ${fields.codec} is unknown`);
    this.fields = fields;
    this.codec = CODECS[fields.codec];
    this.sizes = fields.ranks ?? fields.blocks.map(() => fields.width);
    this.recordBytes = this.sizes.reduce((sum, d) => sum + this.codec.size(d), 8);
  }

  static at(root, reference) {
    let [name, version] = reference.split("@");
    version ??= JSON.parse(fs.readFileSync(path.join(root, name, "alias.json"), "utf8")).version;
    return new Table(root, name, version);
  }

  /** One verified record. */
  record(id) {
    const { fields } = this;
    if (id >= fields.vocab_size) throw new Error(`id ${id} is not below ${fields.vocab_size}`);
    let [shard, position] = [id % fields.num_shards, Math.floor(id / fields.num_shards)];
    if (fields.parent) {
      position = fields.changed.indexOf(id);
      if (position < 0) return Table.at(this.root, fields.parent).record(id);
      shard = 0;
    }
    const [k, n] = [shard, fields.num_shards].map((number) => String(number).padStart(5, "0"));
    const file = fs.readFileSync(path.join(this.folder, `shard-${k}-of-${n}.safetensors`));
    const start = 8 + Number(file.readBigUInt64LE(0));
    const { dtype, shape } = JSON.parse(file.subarray(8, start).toString()).records;
    if (dtype !== "U8" || shape[1] !== this.recordBytes || shape[0] * shape[1] !== file.length - start) {
      throw new Error("shard file of another table");
    }
    const from = start + position * this.recordBytes;
    const record = file.subarray(from, from + this.recordBytes);
    const seed = (BigInt(`0x${fields.version}`) + BigInt(id) * 0x9e3779b97f4a7c15n) & MASK;
    const checksum = record.readBigUInt64LE(this.recordBytes - 8);
    if (xxh3(record.subarray(0, -8), seed) !== checksum) throw new Error(`record ${id} fails its checksum`);
    return record;
  }

  /** The values, or with `ranks` the coefficients, of each block of a record. */
  decode(record) {
    let at = 0;
    return this.sizes.map((d) => {
      const block = record.subarray(at, (at += this.codec.size(d)));
      return Array.from({ length: d }, (_, i) => this.codec.value(block, i, d));
    });
  }

  /** The row of one token id: blocks of `width` values. */
  row(id) {
    const { fields, root } = this;
    const finer = (reference, position) => {
      const table = Table.at(root, reference);
      return position >= 0 && position < table.fields.vocab_size ? table.row(position) : null;
    };
    const edit = fields.edits && finer(fields.edits, fields.changed.indexOf(id));
    const frequent = fields.frequent_rows && finer(fields.frequent_rows, fields.frequent.indexOf(id));
    if (edit || frequent) return edit || frequent;
    const blocks = this.decode(this.record(id));
    if (!fields.basis) return blocks;
    const basis = Table.at(root, fields.basis);
    let next = 0;
    return blocks.map((coefficients) => {
      const [row] = basis.row(next++);
      for (const coefficient of coefficients) {
        const [vector] = basis.row(next++);
        vector.forEach((value, i) => (row[i] += coefficient * value));
      }
      return row.map(Math.fround);
    });
  }
}

const [first, ...rest] = process.argv.slice(2);
if (first === "--hash") {
  console.log(xxh3(Buffer.from(rest[1] ?? "", "hex"), BigInt(`0x${rest[0]}`)).toString(16).padStart(16, "0"));
} else {
  const table = Table.at(first, rest[0]);
  const rows = rest.slice(1).map((id) => table.row(Number(id)));
  console.log(JSON.stringify({ table: `${table.fields.name}@${table.fields.version}`, rows }));
}
