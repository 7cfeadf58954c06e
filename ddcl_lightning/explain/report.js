"use strict";
// The page is complete without this: it adds sorting and filtering.
document.querySelectorAll("[data-controls]").forEach(function (holder) {
  var list = document.getElementById(holder.dataset.controls);
  var cards = Array.prototype.slice.call(list.children);
  // Lines of a text break anywhere, and the space before "%" is one that does not break.
  function plain(text) { return text.replace(/\s+/g, " ").trim().toLowerCase(); }
  function add(html) {
    var label = document.createElement("label");
    label.innerHTML = html;
    holder.appendChild(label);
    return label.querySelector("input, select");
  }
  var search = add('<span>Find</span> <input type="search" placeholder="word, class, #place">');
  var sort = holder.dataset.sort && add(
    '<span>Sort by</span> <select><option value="number">number</option><option value="share">share</option>' +
    (holder.dataset.sort === "classes" ? '<option value="purity">purest class</option>' : "") + "</select>");
  var only = holder.dataset.only && add('<input type="checkbox"> <span></span>');
  if (only) { only.parentNode.querySelector("span").textContent = holder.dataset.only; }
  var status = document.createElement("span");
  status.className = "soft";
  status.setAttribute("role", "status");
  holder.appendChild(status);
  function update() {
    var wanted = plain(search.value);
    var shown = 0;
    cards.forEach(function (card) {
      var keep = plain(card.textContent).indexOf(wanted) >= 0 && !(only && only.checked && !("only" in card.dataset));
      card.hidden = !keep;
      shown += keep;
    });
    status.textContent = shown === cards.length ? "" : shown + " of " + cards.length;
    if (sort) {
      var key = sort.value;
      cards.slice().sort(function (a, b) {
        var order = key === "number" ? 0 : b.dataset[key] - a.dataset[key];
        return order || a.dataset.number - b.dataset.number;
      }).forEach(function (card) { list.appendChild(card); });
    }
  }
  holder.addEventListener("input", update);
  window.addEventListener("hashchange", function () {
    var card = document.getElementById(location.hash.slice(1));
    if (cards.indexOf(card) < 0 || !card.hidden) { return; }
    search.value = "";  // a link to a card that is filtered out would lead nowhere
    if (only) { only.checked = false; }
    update();
    card.scrollIntoView();
  });
  holder.hidden = false;
});
