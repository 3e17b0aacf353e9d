"use strict";

// The rows as columns, and the small words that the other scripts share.

const data = JSON.parse(document.getElementById("data").textContent);

const unpack = (column) =>
  column.of ? column.of.map((place) => column.values[place]) : column.values;

const columns = Object.fromEntries(
  Object.entries(data.columns).map(([name, column]) => [name, unpack(column)]),
);
const own = Object.fromEntries(
  Object.entries(data.own).map(([name, column]) => [name, unpack(column)]),
);
const pictureOf = { after: unpack(data.after), before: unpack(data.before) };

const STATES = {
  stored: "stored",
  failed: "failed",
  unknown: "unknown",
  outstanding: "outstanding",
  not_submitted: "not submitted",
};

const cell = (name, row) => columns[name][row] ?? null;

const byId = (id) => document.getElementById(id);

// Text is always set as text: ids, prompts and messages are anybody's.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const grouped = new Intl.NumberFormat("en-US");
const fine = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

const dollars = (amount) => {
  const digits = amount && amount < 1 ? 3 : 2;
  return `$${amount.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits })}`;
};

function duration(seconds) {
  if (seconds < 100) return `${fine.format(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${fine.format(seconds / 3600)} h`;
}
