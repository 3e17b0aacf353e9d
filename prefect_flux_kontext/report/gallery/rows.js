"use strict";

// The rows as columns, and the helpers that the other scripts share.

const data = JSON.parse(document.getElementById("data").textContent);

const unpack = (column) =>
  column.indexes ? column.indexes.map((index) => column.values[index]) : column.values;

const columns = Object.fromEntries(
  Object.entries(data.columns).map(([name, column]) => [name, unpack(column)]),
);
const custom = Object.fromEntries(
  Object.entries(data.custom).map(([name, column]) => [name, unpack(column)]),
);
const thumbnailOf = { after: unpack(data.after), before: unpack(data.before) };

const STATES = {
  stored: "stored",
  failed: "failed",
  unknown: "unknown",
  outstanding: "outstanding",
  not_submitted: "not submitted",
};

const cell = (name, row) => columns[name][row] ?? null;

const byId = (id) => document.getElementById(id);

// Text is always set as text, never as HTML: ids, prompts and messages are untrusted.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const grouped = new Intl.NumberFormat("en-US");
const rounded = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

const dollars = (amount) => {
  const digits = amount && amount < 1 ? 3 : 2;
  return `$${amount.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits })}`;
};

function duration(seconds) {
  if (seconds < 100) return `${rounded.format(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${rounded.format(seconds / 3600)} h`;
}
