// What the checks know of the running system.

export const SYSTEM = JSON.parse(process.env.SYSTEM);
export const OVERLONG = "word ".repeat(2000); // more tokens than the model's context
