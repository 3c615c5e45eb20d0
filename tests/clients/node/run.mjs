// Runs the checks of one client: `node run.mjs PROGRAM RESULTS`.
//
// A check is a function that the program exports by its name in a sentence. Writes a line of JSON
// with the client's name and version, and one for each check.

import { appendFileSync, readFileSync } from "node:fs";

const [program, results] = process.argv.slice(2);
const write = (line) => appendFileSync(results, JSON.stringify(line) + "\n");

const { PACKAGE, checks } = await import(program);
const manifest = new URL(`node_modules/${PACKAGE}/package.json`, import.meta.url);
const { version } = JSON.parse(readFileSync(manifest, "utf8"));
write({ client: `${PACKAGE} (Node)`, version });
for (const [check, run] of Object.entries(checks)) {
  let error = "";
  try {
    await run();
  } catch (raised) {
    error = String(raised.stack ?? raised).slice(0, 1000);
  }
  write({ check, error });
}
process.exit(0); // clients may keep connections open
