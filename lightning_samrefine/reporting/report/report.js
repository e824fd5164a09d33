"use strict";
const PAGE = 48;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node && key !== "style") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function data(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function points(value) {
  if (value === null) return "-";
  const text = (100 * value).toFixed(2);
  return Number(text) === 0 ? "0.00" : (value > 0 ? "+" : "-") + text.replace("-", "");
}

function percent(value) {
  return value === null ? "-" : (100 * value).toFixed(1);
}

function signed(value) {
  return element("b", {className: value > 0 ? "good" : value < 0 ? "bad" : ""}, points(value));
}

// Missing values go last in either direction.
function compare(a, b, direction) {
  const missing = (value) => value === null || Number.isNaN(value);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  if (typeof a === "string") return direction * a.localeCompare(b, undefined, {numeric: true});
  return direction * (a - b);
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const first = column === 0 ? "ascending" : "descending";
      const other = column === 0 ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((cell) => cell.setAttribute("aria-sort", cell === head ? order : "none"));
      const value = (row) => {
        const text = row.cells[column].dataset.value;
        return column === 0 ? text : Number.parseFloat(text);
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a), value(b), order === "ascending" ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
}

function gain(image) {
  return image.raw === null || image.refined === null ? null : image.refined - image.raw;
}

function changes(image) {
  const over = element("img", {className: "over", src: image.tiles.changed, alt: ""});
  const under = element("img", {className: "faded", src: image.tiles.image, alt: ""});
  return element("span", {className: "tile"}, under, over);
}

function boxes(image) {
  const [width, height] = image.size;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  for (const [x0, y0, x1, y1, , predicted, accepted] of image.regions) {
    const color = accepted ? "#19c37d" : "#ff4040";
    const box = document.createElementNS(SVG, "rect");
    const sides = {x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill: "none", stroke: color};
    for (const [key, value] of Object.entries(sides)) box.setAttribute(key, value);
    box.setAttribute("stroke-width", width / 300);
    if (!accepted) box.setAttribute("stroke-dasharray", width / 60);
    const label = document.createElementNS(SVG, "text");
    const place = {x: x0 + width / 250, y: y0 + width / 32, fill: "#fff", stroke: "#000"};
    for (const [key, value] of Object.entries(place)) label.setAttribute(key, value);
    label.setAttribute("stroke-width", width / 200);
    label.setAttribute("paint-order", "stroke");
    label.setAttribute("font-size", width / 36);
    label.textContent = predicted === null ? "" : predicted.toFixed(2);
    svg.append(box, label);
  }
  return svg;
}

function figure(caption, ...content) {
  return element("figure", {}, ...content, element("figcaption", {}, caption));
}

function flat(image, name) {
  return element("span", {className: "tile flat"}, element("img", {src: image.tiles[name], alt: name}));
}

const viewer = document.getElementById("viewer");
const shown = {gallery: null, index: 0};
const galleries = {};

function show(gallery, index) {
  shown.gallery = gallery;
  shown.index = (index + gallery.sorted.length) % gallery.sorted.length;
  const image = gallery.sorted[shown.index];
  document.getElementById("viewer-title").textContent = image.name;
  const accepted = image.regions.filter((region) => region[6]).length;
  document.getElementById("viewer-figures").replaceChildren(
    `mIoU ${percent(image.raw)} → ${percent(image.refined)} % (`, signed(gain(image)),
    `), ${image.fixed} px fixed, ${image.broken} broken, ${image.swapped} swapped; ` +
    `${accepted} of ${image.regions.length} regions accepted`);
  const photo = element("span", {className: "tile"},
    element("img", {src: image.tiles.image, alt: image.name}), boxes(image));
  document.getElementById("viewer-tiles").replaceChildren(
    figure("image; regions by predicted IoU, rejected ones dashed", photo),
    figure("raw", flat(image, "raw")), figure("refined", flat(image, "refined")),
    figure("truth", flat(image, "truth")), figure("changed pixels", changes(image)));
  const {names, colors} = gallery.classes;
  document.getElementById("viewer-legend").replaceChildren(...names.map((name, c) =>
    element("span", {}, element("i", {className: "swatch", style: `background:${colors[c]}`}), name)));
  if (!viewer.open) viewer.showModal();
}

function step(by) {
  show(shown.gallery, shown.index + by);
}

document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
document.getElementById("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

function imageCard(image, index, gallery) {
  const label = element("span", {className: "label"}, image.name + " ", signed(gain(image)));
  const card = element("button", {type: "button", className: "card"}, changes(image), label);
  card.addEventListener("click", () => show(gallery, index));
  return card;
}

function regionCard(region, index, gallery) {
  const words = `${gallery.classes.names[region.class]}, ${region.kind}: predicted ` +
    `${percent(region.pred)} %, true ${percent(region.before)} → ${percent(region.after)} % (`;
  const rest = region.kind === "rejected" ? ")" : `), ${region.fixed} px fixed, ${region.broken} broken`;
  const crop = element("img", {className: "crop", src: region.crop, alt: "", loading: "lazy"});
  const where = element("span", {className: "label soft"}, region.name);
  const label = element("span", {className: "label"}, words, signed(region.after - region.before), rest);
  return element("div", {className: "card"}, crop, label, where);
}

const ORDERS = {
  images: {
    "gain, best first": [gain, -1],
    "gain, worst first": [gain, 1],
    "pixels broken": [(image) => image.broken, -1],
    "pixels fixed": [(image) => image.fixed, -1],
    "raw mIoU, lowest first": [(image) => image.raw, 1],
    "name": [(image) => image.name, 1],
  },
  regions: {
    "best, worst, rejected": [(region) => ["best", "worst", "rejected"].indexOf(region.kind), 1],
    "gain in IoU": [(region) => region.after - region.before, -1],
    "predicted IoU, highest first": [(region) => region.pred, -1],
    "predicted IoU, lowest first": [(region) => region.pred, 1],
    "overconfidence: predicted - true": [(region) => region.pred - region.after, -1],
    "class": [(region) => region.class, 1],
  },
};

function makeGallery(place) {
  const {kind, section} = place.dataset;
  const entries = data(`${kind}-${section}`);
  const gallery = {classes: data(`classes-of-${section}`), sorted: entries};
  const make = kind === "images" ? imageCard : regionCard;
  if (entries.length === 0) {
    place.append(element("p", {className: "soft"}, `No ${kind} to show.`));
    return;
  }
  const orders = ORDERS[kind];
  const select = element("select", {ariaLabel: `Sort ${kind}`},
    ...Object.keys(orders).map((name) => element("option", {value: name}, name)));
  const list = element("ul", {className: `cards ${kind}`});
  const more = element("button", {type: "button", className: "more"});
  const count = element("span", {className: "soft"});
  const grow = () => {
    const start = list.children.length;
    const next = gallery.sorted.slice(start, start + PAGE);
    list.append(...next.map((entry, offset) => element("li", {}, make(entry, start + offset, gallery))));
    const left = entries.length - list.children.length;
    more.hidden = left === 0;
    more.textContent = `show ${Math.min(PAGE, left)} more`;
    count.textContent = `${list.children.length} of ${entries.length}`;
  };
  const sort = () => {
    const [value, direction] = orders[select.value];
    gallery.sorted = [...entries].sort((a, b) => compare(value(a), value(b), direction));
    list.replaceChildren();
    grow();
  };
  select.addEventListener("change", sort);
  more.addEventListener("click", () => {
    const first = list.children.length;
    grow();
    list.children[first]?.querySelector("button")?.focus();
  });
  place.append(element("div", {className: "controls"}, element("label", {}, "sort by ", select), count), list, more);
  sort();
  galleries[`${kind}-${section}`] = gallery;
}

// A row of the table opens its image; the report has no pictures of those that changed the least.
function openImages(table) {
  const gallery = galleries[`images-${table.dataset.section}`];
  const names = new Set(gallery?.sorted.map((image) => image.name));
  table.querySelectorAll(".open").forEach((button) => {
    const name = button.textContent;
    button.disabled = !names.has(name);
    button.addEventListener("click", () =>
      show(gallery, gallery.sorted.findIndex((image) => image.name === name)));
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".gallery").forEach(makeGallery);
document.querySelectorAll("table[data-section]").forEach(openImages);
