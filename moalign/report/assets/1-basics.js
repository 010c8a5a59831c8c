"use strict";
// The chart, the answers and the sorting of tables. All that is written here comes from two JSON blocks and is written
// as text (textContent): a response may hold anything, and nothing of it is ever read as HTML.

const record = JSON.parse(document.getElementById("data").textContent);
const two = record.objectives.length === 2;
const judged = record.rows.filter((row) => row.points.length);
const state = { preference: Math.floor(record.grid.length / 2), prompt: 0, x: 0, y: 1, hidden: new Set(), family: "" };
let answers = null;

const $ = (id) => document.getElementById(id);
const NONE = "–";

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = String(text);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function shape(name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const missing = (value) => value === null || value === undefined;
const number = (value, digits = 3) => (missing(value) ? NONE : value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1"));
const interval = (pair, digits = 3) =>
  missing(pair) ? NONE : `[${number(pair[0], digits)}, ${number(pair[1], digits)}]`;

const weights = (preference) => preference.map((w) => Number(w.toFixed(3))).join(", ");
const named = (preference) => preference.map((w, i) => `${record.objectives[i]} ${Number(w.toFixed(3))}`).join(", ");
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

const MARKS = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.5,-4.5h9v9h-9z", "M0,-5.5L5.2,4.2H-5.2z", "M0,-6L5,0L0,6L-5,0z",
  "M0,5.5L5.2,-4.2H-5.2z", "M-1.7,-5.5h3.4v3.8h3.8v3.4h-3.8v3.8h-3.4v-3.8h-3.8v-3.4h3.8z",
  "M-5,-2.5L-2.5,-5L0,-2.5L2.5,-5L5,-2.5L2.5,0L5,2.5L2.5,5L0,2.5L-2.5,5L-5,2.5L-2.5,0z", "M-5.5,0L4.2,-5.2V5.2z",
  "M5.5,0L-4.2,-5.2V5.2z",
];
const DASHES = ["none", "8 3", "2 2", "10 3 2 3"];

// As in the figures: seven colours; every further seven methods have other dashes, and by turns hollow marks.
function lookOf(row) {
  const index = judged.indexOf(row);
  const [hue, turn] = [index % 7, Math.floor(index / 7)];
  return { hue, dashes: DASHES[turn % 4], mark: MARKS[index % 9], fill: turn % 2 ? `hollow s${hue}` : `f${hue}` };
}

function swatch(row) {
  const made = shape("svg", { class: "swatch", viewBox: "-8 -8 16 16", "aria-hidden": "true" });
  made.append(shape("path", { d: lookOf(row).mark, class: lookOf(row).fill }));
  return made;
}
